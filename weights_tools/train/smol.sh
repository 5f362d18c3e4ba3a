#!/bin/sh
# Trains refrag-smol in the background: smol.sh start|resume|stop|status [options of smol/run_all.py]
# State is kept in $REFRAG_SMOL_STATE (default ~/.cache/refrag-train): pgid, log, a folder for each stage, export/. `start` and `resume` are the same.
set -eu
cd "$(dirname "$0")/../.."
state=${REFRAG_SMOL_STATE:-$HOME/.cache/refrag-train}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$state"
running() { [ -s "$state/pgid" ] && kill -s 0 -- "-$(cat "$state/pgid")" 2>/dev/null; }
command=${1:-status}
[ $# -eq 0 ] || shift
case $command in
start|resume)
    if running; then
        echo "runs already: process group $(cat "$state/pgid")"
        exit 1
    fi
    allocator=$(ldconfig -p | sed -n 's/.*libtcmalloc_minimal\.so\.4 .*=> //p' | head -n 1)  # a third faster than glibc's
    # A session of its own is a scheduling group of its own: nice counts only between groups by what autogroup says, and only the new session may say it.
    setsid nice -n 19 sh -c 'echo 19 2>/dev/null >/proc/self/autogroup || true; exec "$@"' sh env OMP_WAIT_POLICY=PASSIVE LD_PRELOAD="$allocator" \
        "$python" -m weights_tools.train.smol.run_all weights_tools/train/configs/smol --out "$state/export" "$@" >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pgid"
    echo "process group $!, log $state/log"
    ;;
stop)  # the stage saves first
    running || { echo "does not run"; exit 0; }
    kill -s CONT -- "-$(cat "$state/pgid")"
    echo 0 2>/dev/null >"/proc/$(cat "$state/pgid")/autogroup" || true  # on a busy machine the step would not end for long
    kill -s TERM -- "-$(cat "$state/pgid")"
    while running; do sleep 1; done
    echo "stopped; '$0 resume' goes on"
    ;;
status)
    if running; then echo "runs: process group $(cat "$state/pgid")"; else echo "does not run"; fi
    tail -n 5 "$state/log"
    ;;
*)
    echo "usage: $0 start|resume|stop|status" >&2
    exit 2
    ;;
esac
