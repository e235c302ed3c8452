# Steps of a set-up, for ./dev: one line each on the terminal, everything else in the log. Steps may run beside each
# other, in lanes. Reads: log, steps, command.

on_terminal=
interval=30 # seconds between two lines about steps under way
if [ -t 1 ]; then on_terminal=1 interval=1; fi

step() { # LABEL COMMAND...: the command's status. Run by `run` or in a lane, which show it
    label=$1
    shift
    date +%s >"$steps/$label.began"
    status=0
    "$@" </dev/null >"$steps/$label.log" 2>&1 || status=$?
    printf '%s %s\n' "$status" "$(date +%s)" >"$steps/$label.ended"
    return "$status"
}

show_ended() { # prints each step that has ended since the last look
    for ended in "$steps"/*.ended; do
        [ -e "$ended" ] || continue
        label=$(basename "$ended" .ended)
        read -r status at <"$ended" || continue # being written
        read -r began <"$steps/$label.began"
        [ -z "$on_terminal" ] || printf '\r\033[K'
        printf '  %-40s%5d s' "$label" "$((at - began))"
        if [ "$status" -eq 0 ]; then printf '\n'; else printf '   failed\n'; fi
        { printf '\n==== %s (%d s, status %d)\n' "$label" "$((at - began))" "$status" && cat "$steps/$label.log"; } >>"$log"
        mv "$ended" "$steps/$label.shown"
    done
}

show_running() { # prints the steps under way: for how long, and the last line that each has said
    line=
    for began_file in "$steps"/*.began; do
        label=$(basename "$began_file" .began)
        if [ -e "$steps/$label.shown" ] || [ -e "$steps/$label.ended" ]; then continue; fi
        read -r began <"$began_file" 2>/dev/null || continue # none, or being written
        [ -n "$on_terminal" ] || [ "$((now - began))" -ge "$interval" ] || continue
        said=$(tail -c 1000 "$steps/$label.log" 2>/dev/null | tr '\r\t' '\n ' | grep '[[:alnum:]]' | tail -n 1 |
            sed 's/^ *//' | tr -cd '[:print:]' | cut -c 1-50)
        line="${line:+$line | }$label: $((now - began)) s${said:+, $said}"
    done
    [ -n "$line" ] || return 0
    if [ -n "$on_terminal" ]; then
        columns=$(stty size 2>/dev/null </dev/tty | cut -d ' ' -f 2)
        [ "${columns:-0}" -gt 10 ] || columns=80
        printf '\r\033[K%s' "$(printf '  %s' "$line" | cut -c 1-"$((columns - 1))")"
    else
        printf '  ... %s\n' "$line"
    fi
}

lanes= # process IDs of what runs in the background

watch() { # shows what the lanes do, until all have ended
    last=$(date +%s)
    while :; do
        alive=
        for lane in $lanes; do
            if kill -0 "$lane" 2>/dev/null; then alive=1; fi
        done
        show_ended
        [ -n "$alive" ] || break
        now=$(date +%s)
        if [ "$((now - last))" -ge "$interval" ]; then
            show_running
            last=$now
        fi
        sleep 0.2 2>/dev/null || sleep 1
    done
    for lane in $lanes; do wait "$lane" || true; done
    lanes=
    show_ended
}

run() { # LABEL COMMAND...: a step by itself; its status
    rm -f "$steps/$1."*
    step "$@" &
    lanes=$!
    watch
    status_of_shown "$1"
}

status_of_shown() { # LABEL: a step that was killed has no status
    [ -e "$steps/$1.shown" ] && read -r status _ <"$steps/$1.shown" && return "$status"
    return 1
}

end_lanes() { # Ctrl-C or SIGTERM: background processes of sh ignore the terminal's SIGINT
    [ -z "$on_terminal" ] || printf '\n'
    for lane in $lanes; do end_tree "$lane"; done
    lanes=
}

end_tree() ( # PID: and what it has started; the parent first, which would go on with its next command
    children=$(cat "/proc/$1/task/$1/children" 2>/dev/null || true)
    kill -TERM "$1" 2>/dev/null || true
    for child in $children; do end_tree "$child"; done
)

must_have_passed() { # LABEL: dies with the end of its log where it did not
    status_of_shown "$1" && return
    said="$steps/$1.log"
    printf '\nThe last lines of %s (all: %s):\n' "$1" "$log" >&2
    tail -n 20 "$said" >&2
    if grep -qiE 'no space left on device' "$said"; then
        die "the set-up stopped at: $1: the disk is full (see above)" 1
    elif grep -qiE 'Temporary failure in name resolution|Name or service not known|Connection refused|Network is unreachable|NewConnectionError|Failed to establish a new connection|error sending request|dns error' "$said"; then
        die "the set-up stopped at: $1: no package index could be reached. With a proxy or an index of your own, set
     PIP_PROXY or PIP_INDEX_URL; then repeat ./dev $command: it goes on where it stopped" 1
    fi
    die "the set-up stopped at: $1. Repeating ./dev $command goes on from there" 1
}

mandatory() { # LABEL COMMAND...
    run "$@" || true
    must_have_passed "$1"
}
