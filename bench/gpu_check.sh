#!/usr/bin/env bash
# Checks and measures this checkout on the GPU of this machine, a part at a time; `make gpu-check` calls it.
#
#   bench/gpu_check.sh quick      OUT   what a quarter of an hour shows, in two calls: see gpu_quick.sh
#   bench/gpu_check.sh carry            packs what quick takes along to a machine without compiler or headers: see
#                                       gpu_carry.sh
#   bench/gpu_check.sh tests      OUT   the whole test suite; refrag-nano's answers on the GPU and on the CPU
#   bench/gpu_check.sh sanitize   OUT   compute-sanitizer's memcheck, racecheck and synccheck over the ops' tests
#   bench/gpu_check.sh bench      OUT   `refrag bench`, llama-2-7b with roberta-large: Markdown and JSON
#   bench/gpu_check.sh attention  OUT   bench_cuda's single ops, and PyTorch's attention beside them
#
# Logs and results go to OUT, at most 8 files a part. The exit status is 0 only if everything ran and passed. A part
# builds what it needs and ends within GPU_CHECK_SECONDS (530) on 16 cores and one H200; what has no time left is
# stopped and said to be unfinished, and what was done before it stays. Nothing is installed: compilers and headers have
# to be there (`make deps`); CPPFLAGS and LDFLAGS from the environment reach the build.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
part=${1:-}
out=${2:-build/gpu-check}
build=${REFRAG_BUILD:-build}
total=${GPU_CHECK_SECONDS:-530}
status=0

log=/dev/null
say() { echo "gpu-check $part: $*" | tee -a "$log"; }
die() {
    say "$*" >&2
    exit 1
}
# Seconds that are left for a step that wants at most $1.
seconds_for() {
    local left=$((total - SECONDS))
    [ "$left" -ge 1 ] || left=1
    if [ "$left" -lt "$1" ]; then echo "$left"; else echo "$1"; fi
}
# limited LIMIT COMMAND...: the command's status; 124 where it was stopped.
limited() {
    local limit
    limit=$(seconds_for "$1")
    shift
    timeout -k 10 "$limit" "$@"
}
# passed NAME STATUS: says how a step went, and remembers what did not pass.
passed() {
    if [ "$2" -eq 0 ]; then
        say "$1: passed ($SECONDS s)"
    elif [ "$2" -eq 124 ] || [ "$2" -eq 137 ]; then
        say "$1: UNFINISHED, out of time ($SECONDS s)"
        status=1
    else
        say "$1: FAILED, status $2 ($SECONDS s)"
        status=1
    fi
}

case $part in
    quick) exec bash bench/gpu_quick.sh "$out" ;;
    carry) exec bash bench/gpu_carry.sh ;;
    tests | sanitize | bench | attention) ;;
    *)
        echo "gpu-check: PART must be quick, carry, tests, sanitize, bench or attention; found \"$part\"" >&2
        exit 1
        ;;
esac
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || die "no GPU on this machine (nvidia-smi finds none)"
if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
    PATH=$PATH:/usr/local/cuda/bin
fi
command -v nvcc >/dev/null || die "no nvcc on this machine"
mkdir -p "$out" || die "cannot make $out"
out=$(cd "$out" && pwd)
log=$out/$part.txt
{
    echo "date:    $(date -u '+%Y-%m-%d %H:%M') UTC"
    echo "commit:  $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo "machine: $gpu; $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) CPUs"
} | tee "$log"

# Line tables cost nothing and let the sanitizer name lines; the architectures are compiled side by side.
make_it() {
    NVCCFLAGS="-lineinfo --threads 3 ${NVCCFLAGS:-}" limited 300 make -j"$(nproc)" "$@" >>"$log" 2>&1
    local result=$?
    passed build "$result"
    [ "$result" -eq 0 ] && return
    tail -n 40 "$log"
    exit 1
}

part_tests() {
    make_it all "$build/refrag-tests" test-files
    REFRAG_BINARY=$build/refrag limited 400 "$build/refrag-tests" >>"$log" 2>&1
    local result=$?
    [ "$result" -eq 0 ] || grep -A 12 -E 'ERROR|FATAL|TEST CASE' "$log" | head -n 120
    tail -n 1 "$log"
    passed "test suite" "$result"

    local questions=() question device
    while IFS='|' read -r question _; do
        [ -z "$question" ] || questions+=(-q "$question")
    done <bench/demo/questions.txt
    local answers=$out/run.txt
    for device in cpu cuda; do
        echo "refrag run --device $device"
        limited 60 "$build/refrag" run -m weights_tools/refrag-nano --passages bench/demo/passages.jsonl \
            "${questions[@]}" -n 32 --device "$device" 2>&1 >"$out/$device.answers" | sed 's/^/  /'
        passed "run --device $device" "${PIPESTATUS[0]}" >&2
        sed 's/^/  /' "$out/$device.answers"
    done >"$answers"
    grep -q . "$out/cuda.answers" && cmp -s "$out/cpu.answers" "$out/cuda.answers"
    passed "the same answers on cuda as on cpu" $?
    diff "$out/cpu.answers" "$out/cuda.answers"
    rm -f "$out/cpu.answers" "$out/cuda.answers"
}

part_sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        say "SKIP: compute-sanitizer is not installed"
        return
    fi
    make_it "$build/refrag-tests"
    local tool options
    for tool in memcheck racecheck synccheck; do
        options=(--tool "$tool" --error-exitcode 9 --print-limit 50)
        if [ "$tool" = memcheck ] && compute-sanitizer --help 2>&1 | grep -q track-stream-ordered-races; then
            options+=(--track-stream-ordered-races all)
        fi
        limited 150 compute-sanitizer "${options[@]}" "$build/refrag-tests" -tc="backends:*,llama: logits*" -d=true \
            >"$out/$tool.txt" 2>&1
        passed "$tool" $?
        grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|passed, .* failed' "$out/$tool.txt"
    done
}

# sweep NAME LIMIT OPTIONS...: a table into bench.md, the same as NAME.json, what else is said into the log.
sweep() {
    local name=$1 limit=$2
    shift 2
    echo "refrag bench $*" >>"$log"
    {
        echo "## $name"
        echo
        echo "\`refrag bench $*\`"
        echo
    } >>"$out/bench.md"
    limited "$limit" "$build/refrag" bench --device cuda --shape llama-2-7b --encoder-shape roberta-large \
        -o md --json "$out/$name.json" "$@" >>"$out/bench.md" 2>>"$log"
    local result=$?
    echo >>"$out/bench.md"
    [ "$result" -eq 0 ] || tail -n 5 "$log"
    passed "$name" "$result"
}

part_bench() {
    make_it all
    local grid=(-k "8,16,32" -p "0,0.1" --modes "full,refrag" --from "cached,text")
    : >"$out/bench.md"
    # What matters most first. Each command makes its weights anew, so that a later one that is stopped takes nothing
    # with it.
    sweep batch1 200 --context 512,1024,2048,4096,8192,16384 "${grid[@]}" -b 1 -n 32 --repeats 3 --row-seconds 3
    sweep throughput 100 --context 16384 -k 16,32 -p 0 --from cached -b 1,8 -n 256 --repeats 1 --row-seconds 10
    sweep batch8-short 120 --context 512,1024,2048,4096 "${grid[@]}" -b 8 -n 32 --repeats 1 --row-seconds 3
    sweep batch8-long 150 --context 8192,16384 "${grid[@]}" -b 8 -n 32 --repeats 1 --row-seconds 3
}

part_attention() {
    make_it "$build/bench_cuda"
    limited 240 "$build/bench_cuda" 2>>"$log" | tee "$out/attention.md"
    local ours=${PIPESTATUS[0]}
    [ "$ours" -eq 0 ] || tail -n 5 "$log"
    passed bench_cuda "$ours"
    limited 180 python3 bench/sdpa.py 2>>"$log" | tee "$out/sdpa.md"
    passed sdpa.py "${PIPESTATUS[0]}"
}

case $part in
    tests) part_tests ;;
    sanitize) part_sanitize ;;
    bench) part_bench ;;
    attention) part_attention ;;
esac
say "$([ "$status" -eq 0 ] && echo passed || echo 'NOT passed'), $SECONDS s; results in $out"
exit "$status"
