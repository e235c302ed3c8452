# ./dev wheel: an sdist, and a wheel that is built from it; both are checked, and the wheel is tried in an environment of
# its own. Into dist/.

wheel_glibc=2.28
wheel_work=$root/build/wheel

make_wheel() { # [--system-compiler | --target MACHINE]
    system_compiler=
    machine=$(uname -m)
    while [ $# -gt 0 ]; do
        case $1 in
        --system-compiler) system_compiler=1 ;;
        --target)
            [ $# -ge 2 ] || die "wheel: --target needs a machine: aarch64"
            machine=$2
            shift
            ;;
        --target=*) machine=${1#*=} ;;
        *) die "wheel: unknown argument: $1" ;;
        esac
        shift
    done
    if [ "$machine" != "$(uname -m)" ]; then
        [ "$machine" = aarch64 ] || die "wheel: on $(uname -m) there are wheels for $(uname -m) and aarch64, not $machine"
        [ -z "$system_compiler" ] || die "wheel: only Zig's compiler builds for another machine: --system-compiler does not"
    fi
    [ "$(uname -s)" = Linux ] || die "wheels are made on Linux"
    make_wheel_tools
    tools=$wheel_work/tools/bin
    PATH=$tools:$PATH
    require_wheel_programs
    rm -rf "$wheel_work/built" dist
    set -- -C cmake.define.SDPNET_LIBJPEG=bundled \
        -C "cmake.define.SDPNET_LIBJPEG_TURBO_ARCHIVE=${SDPNET_LIBJPEG_TURBO_ARCHIVE:-}"
    platform=auto
    if [ -z "$system_compiler" ]; then
        SDPNET_ZIG=$(python -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))')
        SDPNET_GLIBC=$wheel_glibc
        SDPNET_MACHINE=$machine
        export SDPNET_ZIG SDPNET_GLIBC SDPNET_MACHINE
        # The second setting is for the tag of the wheel. As a variable of this shell it would be for pip, too.
        set -- "$@" -C "cmake.toolchain-file=$root/cmake/zig.cmake" -C "env._PYTHON_HOST_PLATFORM=linux-$machine"
        platform=manylinux_$(printf '%s' "$wheel_glibc" | tr . _)_$machine
    fi
    # The sdist, and from it the wheel.
    python -m build --outdir "$wheel_work/built" "$@" .
    # Refuses the tag if a symbol is newer than it allows, also for another machine.
    auditwheel_for "$machine" repair --plat "$platform" --only-plat --wheel-dir dist "$wheel_work"/built/*.whl
    cp "$wheel_work"/built/*.tar.gz dist/
    [ "$machine" != aarch64 ] || check_page_size dist/*.whl 65536
    check-wheel-contents dist/*.whl
    twine check --strict dist/*
    if [ "$machine" = "$(uname -m)" ]; then
        try_wheel dist/*.whl
    else
        echo "not tried: the wheel is for $machine"
    fi
    ls -l dist
}

make_wheel_tools() { # build, auditwheel, Zig, ...: the group `wheel` in pyproject.toml
    [ ! -e "$wheel_work/tools/complete" ] || return 0
    find_python
    rm -rf "$wheel_work/tools"
    mkdir -p "$wheel_work"
    "$python" -m venv "$wheel_work/tools" ||
        die "$python can make no virtual environment
     to do: $(how_to_install "python$python_version-venv")"
    "$wheel_work/tools/bin/python" -m pip -q --disable-pip-version-check install --upgrade pip
    "$wheel_work/tools/bin/python" -m pip -q --disable-pip-version-check install --group wheel
    : >"$wheel_work/tools/complete"
}

require_wheel_programs() {
    needs=
    command -v nasm >/dev/null || [ "$machine" != x86_64 ] || needs=nasm # libjpeg-turbo's assembler
    [ -z "$system_compiler" ] || command -v c++ >/dev/null || needs="$needs g++"
    [ -n "$needs" ] || return 0
    # shellcheck disable=SC2086
    if is_root_with_apt; then
        apt_install $needs
    else
        die "the wheel needs: $needs
     to do: $(how_to_install $needs)"
    fi
}

auditwheel_for() { # MACHINE ARG ...: auditwheel reads wheels for every machine, but takes only the tags of its own
    python -c '
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())' "$@"
}

# Some aarch64 machines (GH200) have pages of 64 KiB and load only what is aligned to them.
check_page_size() { # WHEEL BYTES
    python -c '
import io, sys, zipfile
from elftools.elf.elffile import ELFFile # comes with auditwheel
wheel, size = zipfile.ZipFile(sys.argv[1]), int(sys.argv[2])
names = [name for name in wheel.namelist() if name.endswith(".so")]
for name in names:
    segments = ELFFile(io.BytesIO(wheel.read(name))).iter_segments("PT_LOAD")
    if any(segment["p_align"] % size for segment in segments):
        sys.exit(f"{name}: not aligned to pages of {size} bytes")
assert names' "$@"
}

try_wheel() { # WHEEL: installs it, makes images, converts and verifies them with the native libraries, without torch
    trial=$wheel_work/trial
    rm -rf "$trial"
    mkdir -p "$trial"
    python -m venv "$trial/venv"
    "$trial/venv/bin/python" -m pip -q --disable-pip-version-check install "$1"
    (
        cd "$trial"
        unset PYTHONPATH
        PATH=$trial/venv/bin:$PATH
        python -c '
import sys
from importlib.metadata import files
from sdpnet.pipelines.native import decoder
from sdpnet.preprocess.encoding import jpeg
assert "torch" not in sys.modules
notices = {"LICENSE", "LICENSE-libjpeg-turbo.md", "README-libjpeg-turbo.ijg", "libjpeg-turbo.cdx.json"}
assert notices <= {file.name for file in files("sdpnet")}, "a licence or the SBOM is missing"
decoder.load(); print(jpeg.version())'
        python -m sdpnet.preprocess.make_synthetic --out images --seed 0 >/dev/null
        sdpnet convert --source images --out shards >/dev/null
        sdpnet verify shards
    )
    rm -rf "$trial"
}
