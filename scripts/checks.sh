# ./dev test and ./dev lock: the checks, what a failure means, and the versions that passed.

run_tests() { # [--full] [pytest's arguments]
    full=
    count=$#
    while [ "$count" -gt 0 ]; do
        argument=$1
        shift
        count=$((count - 1))
        if [ "$argument" = --full ]; then full=1; else set -- "$@" "$argument"; fi
    done
    selected=$*
    if [ -n "$full" ]; then set -- -m '' "$@"; fi
    : >"$test_log"
    rm -f "$test_log.failed"
    failed=
    check 'ruff check' ruff check
    check 'ruff format' ruff format --check
    check mypy mypy
    check_where_installed hadolint containers/Dockerfile
    check_where_installed actionlint .github/workflows/*.yml
    check documents build_documents
    # Without the last option, pytest-xdist waits for ever after a worker has crashed.
    check pytest pytest -q -n 2 --dist loadfile --max-worker-restart=0 "$@"
    if [ -z "$selected" ] && nvidia-smi -L >/dev/null 2>&1; then # the run above sees no GPU
        check 'pytest of the GPU' pytest -q -m gpu
    fi
    if [ -n "$failed" ]; then
        explain_failure
        exit 1
    fi
    [ -n "$selected" ] || python -m pip freeze --exclude-editable >"$passed"
}

build_documents() { # into .venv/site; a warning is a failure. Nothing is fetched from a network
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$venv/site"
}

serve_documents() { # [mkdocs serve's arguments]
    NO_MKDOCS_2_WARNING=1 mkdocs serve "$@"
}

check() { # NAME COMMAND...: its output is shown and kept
    name=$1
    shift
    printf '==== %s\n' "$*" >>"$test_log"
    { "$@" 2>&1 || echo "$name" >"$test_log.failed"; } | tee -i -a "$test_log"
    if [ -e "$test_log.failed" ]; then
        failed="${failed:+$failed, }$name"
        rm "$test_log.failed"
    fi
}

check_where_installed() { # PROGRAM ARG...
    if command -v "$1" >/dev/null; then
        check "$1" "$@"
    else
        echo "$1: not installed, so $2 is not checked (.venv/bin/python -m pip install --group lint)" | tee -a "$test_log"
    fi
}

explain_failure() {
    printf '\nNot passed: %s. All output is in %s\n' "$failed" "$test_log"
    case $failed in
    *'ruff format'*) echo '  ruff format: files are not laid out as the style has it; ruff format mends them' ;;
    esac
    case $failed in
    *documents*) echo '  documents: the lines with WARNING name the page or docstring; ./dev docs shows the pages as you write' ;;
    esac
    case $failed in
    *pytest*)
        first=$(sed -n 's/^\(FAILED\|ERROR\) \(tests[^ ]*::.*\)/\2/p' "$test_log" | sed 's/ - .*//' | head -n 1)
        [ -z "$first" ] || printf "  one test alone:  .venv/bin/python -m pytest '%s'\n" "$first"
        ;;
    esac
    python tests/support/locked_versions.py "$lock" || true
}

write_lock() {
    freeze=$(python -m pip freeze --exclude-editable)
    [ "$freeze" = "$(cat "$passed" 2>/dev/null)" ] ||
        die "the whole suite has not passed with the versions in .venv: run ./dev test (without arguments) first"
    uv=$(command -v uv) || {
        uv=
        [ -x "$venv/uv/bin/uv" ] || pip_install -q --target "$venv/uv" uv
        uv=$venv/uv/bin/uv
    }
    # uv keeps what is in the file that it writes, wherever it fits, and adds what other Pythons need.
    cp "$passed" "$lock.new"
    "$uv" pip compile -q --universal --python-version 3.10 --extra train --extra docs --extra ffcv --extra dali \
        --group test --no-header --no-annotate --no-emit-index-url --no-emit-find-links -o "$lock.new" pyproject.toml
    python tests/support/locked_versions.py --write "$lock.new" "$lock"
    rm -f "$lock.new"
    echo "$lock: written; ./dev setup --locked installs these versions"
}
