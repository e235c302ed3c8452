# What ./dev installs and with what: system packages, Python and .venv, pip, the native libraries, FFCV and DALI.

# ---- system packages

is_root_with_apt() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null
}

apt_install() { # PACKAGE...
    # What a killed set-up left half configured would stop every later installation.
    dpkg --configure -a || true
    if [ -z "$apt_lists_are_fresh" ]; then
        apt-get update || true # one broken foreign source must not stop the others
        apt_lists_are_fresh=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 \
        install -y --no-install-recommends "$@"
}

how_to_install() { # PACKAGE...: what a person would type
    if ! command -v apt-get >/dev/null; then
        printf "install what Debian calls %s" "$*"
        return
    fi
    sudo=
    [ "$(id -u)" -eq 0 ] || sudo='sudo '
    printf '%sapt-get update && %sapt-get install -y --no-install-recommends %s' "$sudo" "$sudo" "$*"
}

# ---- Python and the virtual environment

find_python() { # sets python and python_version
    # The .venv that is about to be replaced may be the active one.
    PATH=$(printf '%s' "$PATH" | tr ':' '\n' | grep -vxF "$venv/bin" | paste -s -d : -)
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        # A command that exists may still not run: pyenv leaves such stubs behind.
        python_version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])
sys.exit(sys.version_info < (3, 10))' 2>/dev/null) && return
    done
    die "no Python 3.10 or newer among: ${PYTHON:-python3, python3.14 ... python3.10}
     to do: $(how_to_install python3 python3-venv)   or set PYTHON=/path/to/python3"
}

venv_works() {
    [ -x "$venv/bin/python" ] && [ "$(cat "$owner" 2>/dev/null)" = "$root" ] &&
        "$venv/bin/python" -m pip --version
}

make_venv() {
    "$python" -m venv "$venv" && return
    # Debian and Ubuntu ship venv apart from Python.
    if is_root_with_apt && apt_install "python$python_version-venv" && "$python" -m venv "$venv"; then
        return
    fi
    "$python" -m virtualenv "$venv" && return
    "$python" -m pip install --target "$venv/virtualenv" virtualenv &&
        PYTHONPATH="$venv/virtualenv" "$python" -m virtualenv "$venv"
}

clear_venv() { # keeps a .venv that works; removes one of ours that does not
    make=
    if ! venv_works >/dev/null 2>&1; then
        if [ -e "$venv" ] && [ ! -e "$owner" ]; then
            die "$venv was not made by ./dev: move it away, then repeat"
        fi
        find_python
        rm -rf "$venv"
        mkdir "$venv"
        printf '%s\n' "$root" >"$owner"
        make=1
    fi
    rm -rf "$stamp" "$steps" "$venv/tmp"
    mkdir "$steps" "$venv/tmp"
    : >"$log"
}

set_up_venv() {
    [ -n "$make" ] || return 0
    if ! run "virtual environment, Python $python_version" make_venv; then
        rm -f "$venv/bin/python" # half of one
        die "$python can make no virtual environment (see $log)
     to do: $(how_to_install "python$python_version-venv")"
    fi
}

# ---- Python packages

pip_install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$venv/bin/python" --no-progress "$@" && return
        echo 'uv could not do it; now pip tries:'
    fi
    TMPDIR=$venv/tmp "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off "$@"
}

uv=

# uv takes a quarter of pip's time (68 s against 262 s for '.[test]' alone, cold, on two busy cores), but it reads neither
# pip's configuration nor its environment variables: where these say anything about where packages come from, or which,
# pip does the work.
choose_installer() { # sets uv
    rest=$([ -z "$locked" ] || unset PIP_CONSTRAINT # it is ours
        "$venv/bin/python" -m pip config list 2>/dev/null | sed "s/^:env:/env/; s/=.*//" |
        grep -vE '[.](config-file|disable-pip-version-check|no-input|user|require-virtualenv|(default-)?timeout|retries|cache-dir|progress-bar|root-user-action|break-system-packages|no-color)$' |
        sed 's/.*[.]//' | sort -u | paste -s -d ' ' -)
    if [ -n "$rest" ]; then
        echo "  installing with pip: its configuration says more than uv reads ($rest)"
        return
    fi
    found=$(command -v uv) || {
        found=$venv/uv/bin/uv
        [ -x "$found" ] || run uv pip_install --target "$venv/uv" uv || return 0
    }
    "$found" --version >/dev/null 2>&1 || return 0
    uv=$found
    echo "  installing with $("$uv" --version | cut -d ' ' -f 1,2)"
}

needs_cuda_12() { # CUDA 13 has neither kernels for cards before 7.5 (V100) nor support for drivers before 580
    command -v nvidia-smi >/dev/null || return 1
    nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null |
        awk -F '[, ]+' '$1 ~ /^[0-9]+[.][0-9]+$/ && ($1 < 7.5 || $2 + 0 < 580) { found = 1 }
                        END { exit !found }'
}

choose_constraints() {
    : >"$constraints"
    dali_extra=dali
    if [ -n "$locked" ]; then
        cat "$lock" >"$constraints"
        # Replaces a constraints file of the machine's own, which might forbid what the lock names.
        export PIP_CONSTRAINT="$constraints"
    fi
    if needs_cuda_12; then
        printf '  GPU or driver without CUDA 13: torch 2.10 and the CUDA 12 build of DALI\n'
        if [ -n "$locked" ]; then
            echo "  so $lock holds here without torch and what belongs to it"
            grep -vE '^(torch==|torchvision==|triton==|cuda-|nvidia-)' "$lock" >"$constraints"
        fi
        printf 'torch==2.10.*\ntorchvision==0.25.*\n' >>"$constraints"
        dali_extra='dali-cuda120'
    fi
}

# ---- the native libraries (crop decoder, JPEG codec): built with sdpnet itself where that is possible. Their state is
# "ok", or the sentence that says what is amiss

native_needs() { # the Debian packages that building them still needs
    needs=
    compiler=$(command -v c++ || command -v g++) || needs='g++'
    printf '#include <cstdio>\n#include <jpeglib.h>\n' | ${compiler:-false} -x c++ -fsyntax-only - 2>/dev/null ||
        needs="$needs libjpeg-dev"
    printf '%s' "${needs# }"
}

native_works() {
    "$venv/bin/python" -c 'import sys; from sdpnet.pipelines.native import decoder; from sdpnet.preprocess.encoding import jpeg
sys.exit(not (decoder.available() and jpeg.available()))'
}

wants_native() { # a build that has failed is not optional: it ends the set-up
    [ -z "${SDPNET_SKIP_NATIVE:-}" ] && [ -z "$(native_needs)" ] && { [ -n "$whole" ] || ! native_works 2>/dev/null; }
}

check_native() { # sets native
    needs=$(native_needs)
    native='The native libraries are not built, so there is no native pipeline, and conversion is slower and cannot pass images through;'
    if native_works; then
        native=ok
    elif [ -n "${SDPNET_SKIP_NATIVE:-}" ]; then
        native='The native libraries were left out, because SDPNET_SKIP_NATIVE is set.'
    elif [ -n "$needs" ]; then
        # shellcheck disable=SC2086
        native="$native they need: $needs. To do: $(how_to_install $needs) && ./dev setup --retry"
    else
        native="$native the reason is in the output of: $venv/bin/python -m pip install -v --no-deps -e ."
    fi
}

# ---- FFCV and DALI: wanted, not needed. Their state is "ok", "skipped", or the sentence that says what is amiss

ffcv_needs() { # the Debian packages that building FFCV still needs
    needs=
    command -v c++ >/dev/null || command -v g++ >/dev/null || needs="$needs g++"
    "$venv/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        needs="$needs python$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
    command -v pkg-config >/dev/null || needs="$needs pkg-config"
    pkg-config --exists opencv4 2>/dev/null || needs="$needs libopencv-dev"
    pkg-config --exists libturbojpeg 2>/dev/null || needs="$needs libturbojpeg0-dev"
    printf '%s' "${needs# }"
}

compile_ffcv() { # into .venv/wheels, beside other installations: needs nothing of .venv but pip
    rm -rf "$venv/wheels"
    TMPDIR=$venv/tmp "$venv/bin/python" -m pip --disable-pip-version-check --no-input wheel --progress-bar off --no-deps \
        --wheel-dir "$venv/wheels" "$@" 'ffcv==1.0.2'
}

install_extra() { # NAME [WHEEL ...]: what the extra asks for. By -e '.[NAME]' sdpnet would be compiled once more
    "$venv/bin/python" -c 'import sys; from importlib.metadata import requires
print("\n".join(line.split(";")[0] for line in requires("sdpnet") if f"extra == \"{sys.argv[1]}\"" in line))' \
        "$1" >"$venv/extra-$1.txt" || return
    name=$1
    shift
    pip_install -c "$constraints" -r "$venv/extra-$name.txt" "$@"
}

install_ffcv() {
    install_extra ffcv "$venv"/wheels/ffcv-*.whl || return
    "$venv/bin/python" -c 'import ffcv.loader' && return
    # pip keeps what it once compiled; that may be linked to another system's OpenCV (new release, shared home).
    compile_ffcv --no-cache-dir && pip_install --force-reinstall --no-deps "$venv"/wheels/ffcv-*.whl &&
        "$venv/bin/python" -c 'import ffcv.loader'
}

install_dali() {
    install_extra "$dali_extra" || return
    "$venv/bin/python" -c 'import nvidia.dali.fn'
}

wanted() { # STATE: is a backend in this state to be installed now?
    [ -z "${SDPNET_SKIP_BACKENDS:-}" ] || return 1
    case $1 in
    ok) return 1 ;;
    '' | skipped) return 0 ;;
    *) [ -n "$retry" ] ;;
    esac
}
