#!/usr/bin/env bash
# A quarter of an hour on a card, in two calls of this script; `make gpu-check PART=quick` calls it (gpu_check.sh).
#
#   bench/gpu_quick.sh OUT       the first call: every step of the table below, in order, in 480 seconds
#   bench/gpu_quick.sh OUT       the second: in 200 seconds what the first had no time for, then what failed or was stopped
#   bench/gpu_quick.sh --table   the steps, and how long each may take
#
# Which call it is, is in build/gpu-quick.state, which the first call leaves; GPU_QUICK_STEPS="tests ncu" names steps
# instead, and GPU_CHECK_SECONDS another time. Other sources begin anew.
#
# Run are the binaries of build/carry.tar.gz (`make gpu-check PART=carry` packs it), where they are of these sources and
# run on this machine; else they are built here, with warnings and for sm_90a alone. Every step has a limit of its own and
# is killed at it, so that a kernel that hangs costs one step. At most 8 files go to OUT; tables are printed last. The exit
# status is 0 only if every step passed or could not run here (SKIP).
set -uo pipefail
set -m  # a step is a process group, so that all of it can be killed
export LC_ALL=C PYTHONUNBUFFERED=1
cd "$(dirname "$0")/.." || exit 1

# name | seconds expected | seconds at most | what
steps='
probe      |   3 |  10 | card, driver, tools, cuBLAS
binaries   |   2 | 240 | unpack what was carried; build here only if it does not run
tests      |  40 |  80 | GPU tests: each op and network against the scalar loops, long contexts, merges, wide products
run        |  10 |  40 | refrag-nano answers on GPU and CPU
bench1     |  60 | 100 | `refrag bench`, llama-2-7b with roberta-large, 2048 and 16384, k 16 and 32, p 0 and .1, batch 1
bench8     |  60 |  90 | the same, batch 8
bench_cuda |  75 | 110 | single ops, each result checked
sdpa       |  30 |  45 | PyTorch attention at head_dim 128
ncu        |  40 |  60 | counters of the prefill, decode and product kernels
memcheck   |  60 | 120 | compute-sanitizer over the ops'\'' tests
racecheck  |  90 | 120 | the same, shared memory
'
each_step() { printf '%s' "$steps" | sed '/^$/d; s/ *| */|/g'; }
if [ "${1:-}" = --table ]; then
    echo '| step | expected, s | at most, s | what |'
    echo '|---|---|---|---|'
    each_step | while IFS='|' read -r name expected limit what; do echo "| $name | $expected | $limit | $what |"; done
    each_step | awk -F'|' '{ sum += $2 } END { printf "| all | %d | 480 + 200 | |\n", sum }'
    exit
fi

out=${1:-build/gpu-check}
reserve=10  # seconds for the tables
dir=${GPU_QUICK_DIR:-build}
mkdir -p "$out" "$dir" || exit 1
out=$(cd "$out" && pwd)
dir=$(cd "$dir" && pwd)
state=$dir/gpu-quick.state
log=$out/quick.txt
sources=$(bash bench/gpu_carry.sh id)

now_ms() {
    local t=$EPOCHREALTIME
    echo $((${t/./} / 1000))
}
began_ms=$(now_ms)
elapsed() { echo $((($(now_ms) - began_ms) / 1000)); }
say() { echo "gpu-check quick: $*" | tee -a "$log"; }
gone() { ! kill -0 -- "-$1" 2>/dev/null; }

# limited SECONDS FILE COMMAND...: runs it, its output behind FILE's; its status, or 124 where it was killed.
limited() {
    local limit=$1 to=$2 pid end
    shift 2
    "$@" </dev/null >>"$to" 2>>"$log" &
    pid=$!
    end=$(($(now_ms) + limit * 1000))
    while kill -0 "$pid" 2>/dev/null; do
        if [ "$(now_ms)" -lt "$end" ]; then
            sleep 0.05
            continue
        fi
        local signal
        for signal in TERM KILL; do
            kill -s "$signal" -- "-$pid" 2>/dev/null
            end=$(($(now_ms) + (limit < 3 ? limit : 3) * 1000))
            until gone "$pid" || [ "$(now_ms)" -ge "$end" ]; do sleep 0.05; done
            ! gone "$pid" || break
        done
        # What waits in the driver for ever is left behind, not waited for.
        gone "$pid" || say "process $pid does not end; it is left behind"
        gone "$pid" && wait "$pid" 2>/dev/null
        return 124
    done
    wait "$pid"
}

# ---- the steps: a function each, given its seconds -------------------------------------------------------------
missing=77  # a step's status where it cannot run here

find_tools() {
    local cuda=${GPU_QUICK_CUDA:-/usr/local/cuda} folder name packages
    for folder in "$cuda/bin" $([ -n "${GPU_QUICK_CUDA:-}" ] || echo /opt/nvidia/nsight-compute/*); do
        [ -d "$folder" ] && PATH=$PATH:$folder
    done
    # cuBLAS, in CUDA's folder and among PyTorch's packages, by any number.
    local folders=("$cuda/lib64" "$cuda/targets/x86_64-linux/lib")
    packages=$(timeout 10 python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null) &&
        folders+=("$packages/nvidia/cu13/lib" "$packages/nvidia/cublas/lib")
    cublas=
    for name in libcublas.so.13 libcublas.so.12 libcublas.so; do
        for folder in "${folders[@]}"; do
            [ -e "$folder/$name" ] || continue
            cublas=$folder/$name
            export REFRAG_CUBLAS=$cublas LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
            return
        done
    done
}

step_probe() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem --format=csv,noheader \
        >"$out/.gpu" 2>>"$log" || return 1
    local tool
    {
        echo "commit:  $(git rev-parse --short HEAD 2>/dev/null || cat "$dir/carry/commit" 2>/dev/null || echo unknown)"
        echo "date:    $(date -u '+%Y-%m-%d %H:%M') UTC"
        echo "machine: $(head -n 1 "$out/.gpu"); $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) CPUs"
        echo "cuBLAS:  ${cublas:-none found; the dynamic linker may know one}"
        for tool in nvcc g++ make ncu compute-sanitizer python3; do
            echo "$tool: $(command -v $tool || echo none)"
        done
    } >>"$log"
    rm -f "$out/.gpu"
}

# bin: where the three binaries are.
binaries_run() {
    local binary
    for binary in refrag refrag-tests bench_cuda; do [ -x "$bin/$binary" ] || return 1; done
    timeout 10 "$bin/refrag" --version >>"$log" 2>&1 && timeout 10 "$bin/refrag-tests" --version >>"$log" 2>&1
}
step_binaries() {
    bin=$dir/carry/bin
    if [ -f "$dir/carry.tar.gz" ]; then
        rm -rf "$dir/carry"
        tar -C "$dir" -xzf "$dir/carry.tar.gz" 2>>"$log" || say "$dir/carry.tar.gz cannot be unpacked"
    fi
    if [ "$(cat "$dir/carry/sources" 2>/dev/null)" != "$sources" ]; then
        say "no carried binaries of these sources"
    elif binaries_run; then
        echo "binaries: carried, commit $(cat "$dir/carry/commit")" >>"$log"
        return
    else
        say "the carried binaries do not run here"
    fi
    command -v nvcc >/dev/null && command -v make >/dev/null || {
        say "and nothing to build with: no nvcc or no make"
        return 1
    }
    bin=$dir/there
    CPPFLAGS="-isystem $dir/carry/include" LDFLAGS="-L$dir/carry/lib" NVCCFLAGS="--threads 0" \
        limited "$1" "$log" make -j"$(nproc)" BUILD="$bin" CUDA_ARCHS=90a CUDA_PTX= STORE=0 EDIT=0 WERROR=0 \
        "$bin/refrag" "$bin/refrag-tests" "$bin/bench_cuda" || return
    binaries_run
}

# What has cases on a GPU.
gpu_cases='backends:*,card:*,llama: logits*,llama: a ragged batch*,roberta: chunk*,int8 weights:*,pipeline: the default*'
gpu_cases+=',bench on a GPU*'
step_tests() {
    REFRAG_TEST_BACKENDS=cuda REFRAG_BINARY=$bin/refrag limited "$1" "$log" "$bin/refrag-tests" -tc="$gpu_cases" -d=true
}

step_run() {
    local questions=() question device status
    while IFS='|' read -r question _; do
        [ -z "$question" ] || questions+=(-q "$question")
    done <bench/demo/questions.txt
    for device in cuda cpu; do
        : >"$out/.$device"
        limited $(($1 / 2)) "$out/.$device" "$bin/refrag" run -m weights_tools/refrag-nano \
            --passages bench/demo/passages.jsonl "${questions[@]}" -n 32 --device "$device"
        status=$?
        sed "s/^/  $device: /" "$out/.$device" >>"$log"
        [ "$status" -eq 0 ] || break
    done
    if [ "$status" -eq 0 ]; then
        [ -s "$out/.cuda" ] || status=1
        cmp -s "$out/.cpu" "$out/.cuda" || warning "run: the text on the GPU is another than on the CPU (quick.txt has both)"
    fi
    rm -f "$out/.cpu" "$out/.cuda"
    return "$status"
}

# sweep SECONDS BATCH
sweep() {
    local options=(--device cuda --shape llama-2-7b --encoder-shape roberta-large --context "2048,16384" -k "16,32"
        -p "0,0.1" -n 32 -b "$2" --repeats $((4 / $2 + 1)) --row-seconds 3)
    {
        echo "## batch $2"
        echo
        echo "\`refrag bench ${options[*]}\`"
        echo
    } >>"$out/bench.md"
    limited "$1" "$out/bench.md" "$bin/refrag" bench "${options[@]}" -o md --json "$out/bench$2.json"
    local status=$?
    echo >>"$out/bench.md"
    return "$status"
}
step_bench1() { sweep "$1" 1; }
step_bench8() { sweep "$1" 8; }

step_bench_cuda() {
    : >"$out/bench_cuda.md"
    limited "$1" "$out/bench_cuda.md" "$bin/bench_cuda"
}
step_sdpa() {
    : >"$out/sdpa.md"
    limited "$1" "$out/sdpa.md" python3 bench/sdpa.py --dim 128 || return
    ! grep -q '^SKIP' "$out/sdpa.md" || return $missing
}

step_ncu() {
    command -v ncu >/dev/null || return $missing
    : >"$out/ncu.txt"
    # The clocks are left as they are.
    limited "$1" "$out/ncu.txt" ncu --clock-control none --section SpeedOfLight --section Occupancy --section LaunchStats \
        --section MemoryWorkloadAnalysis --section WarpStateStats -k 'regex:prefill|decode|combine|matvec' \
        "$bin/bench_cuda" profile || return
    grep -q 'Duration' "$out/ncu.txt"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || return $missing
    REFRAG_TEST_BACKENDS=cuda limited "$1" "$out/sanitizer.txt" compute-sanitizer --tool "$2" --error-exitcode 9 \
        --print-limit 50 "$bin/refrag-tests" -tc="backends:*" -d=true
    local status=$?
    grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/sanitizer.txt" | tail -n 1 | sed "s/^/  $2: /" >>"$log"
    return "$status"
}
step_memcheck() { sanitize "$1" memcheck; }
step_racecheck() { sanitize "$1" racecheck; }

# ---- which of them, and in what time --------------------------------------------------------------------------
declare -A result=() took=()
warnings=()
warning() {
    warnings+=("$1")
    say "warning: $1"
}
second=no
if [ -f "$state" ] && [ "$(head -n 1 "$state")" = "sources $sources" ]; then
    second=yes
    while read -r name seconds status; do
        result[$name]=$status
        took[$name]=$seconds
    done < <(tail -n +2 "$state")
fi
total=${GPU_CHECK_SECONDS:-$([ $second = yes ] && echo 200 || echo 480)}
: >"$log"
find_tools

wanted=()
if [ -n "${GPU_QUICK_STEPS:-}" ]; then
    read -r -a wanted <<<"$GPU_QUICK_STEPS"
else
    # A step without an entry has not run.
    for pass in new again; do
        while IFS='|' read -r name _; do
            case $pass,${result[$name]:-none} in
                new,none | again,FAILED* | again,STOPPED) wanted+=("$name") ;;
            esac
        done < <(each_step)
    done
fi
# These two are what the others stand on, and take seconds.
wanted=(probe binaries "${wanted[@]}")

save() {
    {
        echo "sources $sources"
        for name in "${!result[@]}"; do echo "$name ${took[$name]} ${result[$name]}"; done
    } >"$state.part" && mv "$state.part" "$state"
}
declare -A ran=()
for name in "${wanted[@]}"; do
    [ -z "${ran[$name]:-}" ] || continue
    limit=$(each_step | awk -F'|' -v name="$name" '$1 == name { print $3 }')
    [ -n "$limit" ] || {
        say "GPU_QUICK_STEPS: no step \"$name\""
        exit 1
    }
    for pair in ${GPU_QUICK_LIMITS:-}; do  # a rehearsal's: "tests=1"
        [ "${pair%%=*}" != "$name" ] || limit=${pair#*=}
    done
    left=$((total - reserve - $(elapsed)))
    # What would be stopped at once is left for the next call.
    [ "$left" -ge 8 ] || continue
    [ "$left" -ge "$limit" ] || limit=$left
    at=$(elapsed)
    "step_$name" "$limit"
    status=$?
    ran[$name]=yes
    took[$name]=$(($(elapsed) - at))
    case $status in
        0) result[$name]=passed ;;
        124) result[$name]=STOPPED ;;
        "$missing") result[$name]=SKIP ;;
        *) result[$name]=FAILED,$status ;;
    esac
    say "$name: ${result[$name]}, ${took[$name]} s"
    save
    case $name,$status in
        probe,0 | binaries,0) ;;
        probe,* | binaries,*) break ;;
    esac
done

# ---- tables, together below the 12000 characters that a reply may be cut to ------------------------------------
# section TITLE FILE CHARACTERS
section() {
    [ -s "$out/$2" ] || return 0
    echo
    echo "---- $1"
    if [ "$(wc -c <"$out/$2")" -le "$3" ]; then
        cat "$out/$2"
    else
        head -c "$3" "$out/$2" | sed '$d'
        echo "(more in $2)"
    fi
}
{
    section "single ops" bench_cuda.md 3400
    section "PyTorch's attention" sdpa.md 1400
    section "refrag bench" bench.md 4400
    if [ "${result[tests]:-}" != passed ] && [ -n "${ran[tests]:-}" ]; then
        echo
        echo "---- tests that failed"
        grep -E -A 4 'ERROR:|FATAL|^TEST CASE' "$log" | cut -c 1-160 | head -c 1200
    fi
    echo
    echo "---- steps"
    while IFS='|' read -r name expected limit _; do
        echo "$name: ${result[$name]:-no time} ($([ -n "${ran[$name]:-}" ] || echo 'before: ')${took[$name]:--} s of $limit)"
    done < <(each_step)
    for text in "${warnings[@]}"; do echo "warning: $text"; done
} >"$out/.tables"
cat "$out/.tables"
cat "$out/.tables" >>"$log"
rm -f "$out/.tables"

bad=0 open=0
while IFS='|' read -r name _; do
    case ${result[$name]:-none} in
        passed | SKIP) ;;
        none) open=$((open + 1)) ;;
        *) bad=$((bad + 1)) ;;
    esac
done < <(each_step)
say "$([ $((bad + open)) -eq 0 ] && echo passed || echo "NOT passed: $bad failed, $open had no time"), $(elapsed) s; files in $out"
[ $((bad + open)) -eq 0 ]
