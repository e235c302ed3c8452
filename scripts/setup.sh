# ./dev setup: what it will take, what runs beside what, and what is kept of it.

# ---- what it will take. Measured with torch 2.14 for CUDA 13 on x86-64, in MB: download, disk

cost_of_torch='3100 5800'
cost_of_torch_elsewhere='300 1100' # from SDPNET_TORCH_INDEX: PyTorch's build for CPUs
cost_of_tools='310 930'
cost_of_ffcv='160 400'
cost_of_ffcv_system='160 700' # g++, OpenCV's and libjpeg-turbo's development files, by apt
cost_of_dali='300 650'

gigabytes() { # MEGABYTES
    awk -v megabytes="$1" 'BEGIN { printf "%.1f GB", megabytes / 1000 }'
}

part() { # DOWNLOAD DISK WHAT
    download=$((download + $1)) disk=$((disk + $2))
    printf '  %9s %9s   %s\n' "$(gigabytes "$1")" "$(gigabytes "$2")" "$3"
}

torch_is_there() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'from importlib.metadata import version
version("torch"), version("torchvision")' 2>/dev/null
}

announce() { # what will be installed, what for and how large; dies where it cannot fit
    download=0 disk=0
    echo '   download      disk   for'
    # shellcheck disable=SC2086 # two words each
    {
        if torch_is_there; then
            echo '       none      none   torch: it is in .venv, and stays if its version fits'
        elif [ -n "${SDPNET_TORCH_INDEX:-}" ]; then
            part $cost_of_torch_elsewhere 'torch and torchvision from SDPNET_TORCH_INDEX (figures: the build for CPUs)'
        else
            part $cost_of_torch 'torch, torchvision, CUDA libraries: training. Less: SDPNET_TORCH_INDEX'
        fi
        part $cost_of_tools 'test tools, ONNX, Ray, TensorBoard, timm, MkDocs: ./dev test, export, ./dev docs'
        if [ -z "${SDPNET_SKIP_BACKENDS:-}" ]; then
            if pkg-config --exists opencv4 2>/dev/null; then
                part $cost_of_ffcv 'FFCV with numba and OpenCV: --pipeline ffcv'
            elif is_root_with_apt; then
                part $cost_of_ffcv 'FFCV with numba and OpenCV: --pipeline ffcv'
                part $cost_of_ffcv_system 'Debian packages that FFCV is compiled with'
            else
                echo '       none      none   FFCV: left out, for lack of what it is compiled with (named at the end)'
            fi
            part $cost_of_dali 'DALI: --pipeline dali'
        fi
    }
    free=$(($(df -Pk "$venv" | awk 'NR == 2 { print $4 }') / 1000))
    room=$free # what a set-up that was cut short has brought counts as room
    torch_is_there || room=$((free + $(du -sk "$venv" | awk '{ print $1 }') / 1000))
    echo "  about $(gigabytes "$download") to download and $(gigabytes "$disk") on the disk (less where packages are cached or there already); $(gigabytes "$free") are free"
    [ -n "${SDPNET_SKIP_BACKENDS:-}" ] ||
        echo "  without FFCV and DALI, which neither demo nor test needs: SDPNET_SKIP_BACKENDS=1 ./dev $command"
    [ -n "${SDPNET_TORCH_INDEX:-}" ] || torch_is_there ||
        echo '  without CUDA, for machines without a GPU: SDPNET_TORCH_INDEX=URL (see ./dev --help)'
    require_room "$disk"
}

require_room() { # MEGABYTES: dies where there are fewer
    [ "$room" -lt "$1" ] || return 0
    die "the disk is too small: $(gigabytes "$1") are needed while it installs, $(gigabytes "$free") are free below $venv.
     Free some, put the checkout on another disk, or leave parts out as said above" 1
}

make_room() { # before the large downloads. pip keeps them all until it has unpacked them, and copies in its cache
    [ -z "$uv" ] || return 0
    require_room "$((disk + download))"
    if [ "$room" -lt "$((disk + 2 * download))" ]; then
        echo "  pip's cache is not used: it would take $(gigabytes "$download") more than there is room for"
        export PIP_NO_CACHE_DIR=1
    fi
}

# ---- setup

fingerprint() { # what a finished set-up depends on
    printf '%s %s ' "$root" "$("$venv/bin/python" -c 'import os, sys
print(os.path.realpath(sys.executable), sys.version.split()[0])' 2>/dev/null)"
    cat pyproject.toml dev scripts/*.sh cmake/* ./*/native/*.h ./*/native/*.cpp ${locked:+"$lock"} | cksum
}

write_stamp() {
    { fingerprint && printf '%s\n%s\n%s\n%s\n%s\n' "$dali_extra" "$native" "$ffcv" "$dali" "$locked"; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

read_stamp() {
    finished='' dali_extra='' native='' ffcv='' dali='' was_locked=''
    [ -e "$stamp" ] || return 0
    {
        read -r finished && read -r dali_extra && read -r native && read -r ffcv && read -r dali && read -r was_locked
    } <"$stamp" || true
}

lane_system() { # Debian packages, then FFCV's compilation: beside lane_packages
    needs=$(native_needs)
    if wanted "$ffcv"; then needs="$needs $(ffcv_needs)"; fi
    needs=$(printf '%s' "$needs" | tr ' ' '\n' | sort -u | paste -s -d ' ' -)
    if [ -n "$needs" ] && is_root_with_apt; then
        # shellcheck disable=SC2086 # package names, one word each
        step 'Debian packages' apt_install $needs || true
    fi
    : >"$steps/system-is-ready"
    if wanted "$ffcv" && [ -z "$(ffcv_needs)" ]; then step 'FFCV: compiling' compile_ffcv || true; fi
}

install_sdpnet() { # the compiler may still be on its way: the native libraries come last
    SDPNET_SKIP_NATIVE=1 pip_install -c "$constraints" -e '.[train,docs]' --group test
}

lane_packages() { # what pip installs into .venv, one after the other
    if [ -n "$whole" ]; then
        if [ -n "${SDPNET_TORCH_INDEX:-}" ] && ! torch_is_there; then
            step 'torch from SDPNET_TORCH_INDEX' pip_install -c "$constraints" --index-url "$SDPNET_TORCH_INDEX" \
                'torch>=2.10,<2.16' 'torchvision>=0.25,<0.30' || return 0
        fi
        step 'sdpnet, torch, test tools' install_sdpnet || return 0
    fi
    if wanted "$dali"; then step 'DALI' install_dali || true; fi
    while [ ! -e "$steps/system-is-ready" ] && kill -0 "$system_lane" 2>/dev/null; do sleep 1; done
    if wants_native; then step 'native libraries' pip_install --no-deps --force-reinstall -e . || true; fi
}

install_side_by_side() {
    lane_system &
    system_lane=$!
    lanes=$system_lane
    lane_packages &
    lanes="$lanes $!"
    watch
    if [ -n "$whole" ]; then
        if [ -n "${SDPNET_TORCH_INDEX:-}" ] && [ -e "$steps/torch from SDPNET_TORCH_INDEX.began" ]; then
            must_have_passed 'torch from SDPNET_TORCH_INDEX'
        fi
        must_have_passed 'sdpnet, torch, test tools'
    fi
    [ ! -e "$steps/native libraries.began" ] || must_have_passed 'native libraries'
    check_native
    if wanted "$ffcv"; then finish_ffcv; else ffcv=${ffcv:-skipped}; fi
    if ! wanted "$dali"; then
        dali=${dali:-skipped}
    elif status_of_shown DALI; then
        dali=ok
    else
        dali="DALI is not installed: $log says why (look for ==== DALI). Try again with: ./dev setup --retry"
    fi
}

finish_ffcv() { # sets ffcv
    needs=$(ffcv_needs)
    if [ -n "$needs" ]; then
        # shellcheck disable=SC2086
        ffcv="FFCV is not installed, it needs: $needs. To do: $(how_to_install $needs) && ./dev setup --retry"
    elif status_of_shown 'FFCV: compiling' && run 'FFCV: installing' install_ffcv; then
        ffcv=ok
    else
        ffcv="FFCV is not installed: $log says why (look for ==== FFCV). Try again with: ./dev setup --retry"
    fi
}

one_at_a_time() { # the lock is held by this process and all that the set-up starts, until they end, however they end
    command -v flock >/dev/null || return 0
    exec 9<"$root/dev"
    flock -n 9 && return
    echo "another set-up of this checkout is running (or what one that was killed has left): waiting for it"
    flock 9
}

setup() { # [--retry] [--locked]
    retry='' locked=''
    for argument in "$@"; do
        case $argument in
        --retry) retry=1 ;;
        --locked) locked=1 ;;
        *) die "setup: unknown argument: $argument" ;;
        esac
    done
    [ -z "$locked" ] || [ -e "$lock" ] || die "there is no $root/$lock (./dev lock writes it)"
    one_at_a_time
    read_stamp
    if [ -n "$locked" ] && [ -z "$was_locked" ]; then finished=''; else locked=$was_locked; fi
    began_setup=$(date +%s)
    if [ -z "$finished" ] || [ "$finished" != "$(fingerprint)" ]; then
        echo "set-up into $venv${locked:+, with the versions in $lock} (log: $log)"
        clear_venv
        whole=1 ffcv='' dali=''
        announce
        set_up_venv
        choose_constraints
        mandatory 'pip' pip_install --upgrade pip
        choose_installer
        make_room
        install_side_by_side
    elif wanted "$ffcv" || wanted "$dali" || { [ -n "$retry" ] && [ "$native" != ok ]; }; then
        echo "set-up of what was missing (log: $log)"
        clear_venv
        whole=''
        choose_constraints
        choose_installer
        install_side_by_side
    else
        [ "$command" != setup ] || echo "set-up: already done ($venv${locked:+, with the versions in $lock})"
        exec 9<&-
        report_missing
        return
    fi
    rm -rf "$venv/tmp" "$venv/wheels"
    write_stamp
    exec 9<&-
    echo "set-up complete: $(($(date +%s) - began_setup)) s, $(du -sk "$venv" | awk '{ printf "%.1f GB", $1 / 1e6 }') in $venv"
    report_missing
}

report_missing() {
    [ "$native" = ok ] || printf '%s\n' "$native"
    [ -z "${SDPNET_SKIP_BACKENDS:-}" ] || return 0
    case $ffcv in ok | skipped) ;; *) printf '%s\n' "$ffcv" ;; esac
    case $dali in ok | skipped) ;; *) printf '%s\n' "$dali" ;; esac
}
