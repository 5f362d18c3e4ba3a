#!/usr/bin/env bash
# `make gpu-check PART=quick` (bench/gpu_quick.sh) from end to end on a machine without a GPU: the card, the binaries and
# the tools are stubs. Prints what went wrong; the status is 0 only if nothing did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
home=$(mktemp -d) || exit 1
trap 'rm -rf "$home"' EXIT
failures=0
fail() {
    echo "gpu_check_rehearsal: $scenario: $*"
    failures=$((failures + 1))
}
has() { grep -qF -- "$1" "$home/said" || fail "does not say \"$1\""; }
has_not() { ! grep -qF -- "$1" "$home/said" || fail "says \"$1\""; }

# ---- stubs. FAKE_x=hang or fail makes that one hang or fail -----------------------------------------------------
stub() {
    mkdir -p "$(dirname "$1")"
    {
        echo '#!/bin/bash'
        cat
    } >"$1"
    chmod +x "$1"
}
behaves='behaves() { case ${!1:-} in hang) trap "" TERM; sleep 1000 & sleep 1000; sleep 1000 ;; fail) exit 3 ;; esac; }'
bin=$home/carry/bin
stub "$bin/refrag" <<STUB
$behaves
case "\$*" in
    --version) [ "\${FAKE_BINARIES:-}" != broken ] || exit 1 ;;
    run*cuda*) behaves FAKE_RUN; echo "\${FAKE_TEXT:-violins}" ;;
    run*) echo violins ;;
    bench*"-b 1 "*) behaves FAKE_BENCH1; for i in {1..40}; do echo "| full | 2048 | row \$i of batch 1 $(printf '%0120d' 7) |"; done ;;
    bench*) behaves FAKE_BENCH8; echo "| full | 16384 | row of batch 8 |" ;;
esac
case "\$*" in *--json*) [ "\$1" = bench ] && while [ \$# -gt 1 ]; do [ "\$1" = --json ] && echo '{}' >"\$2"; shift; done; true ;; esac
STUB
stub "$bin/refrag-tests" <<STUB
$behaves
[ "\$*" != --version ] || exit 0
behaves FAKE_TESTS
[ "\${REFRAG_TEST_BACKENDS:-}" = cuda ] || exit 4
echo "tests with \${REFRAG_CUBLAS:-no cuBLAS}"
STUB
stub "$bin/bench_cuda" <<STUB
$behaves
[ "\$*" != profile ] || { echo profiled; exit; }
behaves FAKE_BENCH_CUDA
for i in {1..120}; do echo "| linear: row \$i | $(printf '%050d' 7) |"; done
STUB
mkdir -p "$home/carry/include" "$home/carry/lib" "$home/tools" "$home/dir"
bash bench/gpu_carry.sh id >"$home/carry/sources"
echo 1234567 >"$home/carry/commit"
stub "$home/tools/nvidia-smi" <<'STUB'
[ "${FAKE_GPU:-}" != none ] && echo "NVIDIA H200, 580.1, 143771 MiB, 4 MiB, 345 MHz, 3201 MHz"
STUB
stub "$home/tools/python3" <<'STUB'
case "$*" in *sdpa.py*) echo "| 32 heads | sdpa ${*: -1} |" ;; *) echo "$PACKAGES" ;; esac
STUB
stub "$home/tools/ncu" <<'STUB'
while [ ! -x "$1" ]; do shift; done
"$@" && echo "    Duration  us  7"
STUB
stub "$home/tools/compute-sanitizer" <<STUB
$behaves
behaves FAKE_SANITIZER
echo "========= ERROR SUMMARY: 0 errors"
STUB
stub "$home/tools/make" <<STUB
for argument in "\$@"; do case \$argument in BUILD=*) to=\${argument#BUILD=} ;; esac; done
mkdir -p "\$to" && cp "$home"/carry/bin/* "\$to/" && echo "made with \$*, \$CPPFLAGS"
sed -i 's/broken/good/' "\$to/refrag"
STUB
stub "$home/tools/nvcc" </dev/null
for command in bash sh env sed awk grep cat cp mv rm mkdir mktemp head tail cut sort xargs find sha256sum tar gzip date nproc \
    sleep timeout wc tee dirname basename git cmp ps; do
    ln -sf "$(command -v $command)" "$home/tools/$command"
done

# scenario NAME VARIABLE=VALUE...: a run in the state of the run before; `fresh` forgets it.
fresh() {
    rm -rf "$home/dir" "$home/out"
    mkdir -p "$home/dir" "$home/out"
    tar -C "$home" -czf "$home/dir/carry.tar.gz" carry
}
quick() {
    scenario=$1
    shift
    rm -rf "$home/out"
    env -i PATH="$home/tools" GPU_QUICK_DIR="$home/dir" GPU_QUICK_CUDA="$home/cuda" PACKAGES="$home/torch" "$@" \
        "$(command -v bash)" bench/gpu_check.sh quick "$home/out" >"$home/said" 2>&1
    status=$?
    local files
    files=$(find "$home/out" -type f | wc -l)
    [ "$files" -le 8 ] || fail "$files files: $(ls -A "$home/out")"
    [ "$(wc -c <"$home/said")" -le 12000 ] || fail "says $(wc -c <"$home/said") characters"
}
expect() { [ "$status" -eq "$1" ] || fail "status $status, expected $1: $(tail -n 15 "$home/said")"; }

torch=$home/torch/nvidia/cu13/lib
mkdir -p "$home/cuda/lib64" "$torch"
touch "$torch/libcublas.so.12" "$home/cuda/lib64/libcublas.so"
fresh
quick "all is well"
expect 0
has "passed"
for step in probe binaries tests run bench1 bench8 bench_cuda sdpa ncu memcheck racecheck; do has "$step: passed"; done
has "row 1 of batch 1"
has "(more in bench.md)"
has "| linear: row 1 |"
has "sdpa 128"
grep -q "tests with $torch/libcublas.so.12" "$home/out/quick.txt" || fail "another cuBLAS"
[ -s "$home/out/bench1.json" ] && [ -s "$home/out/bench8.json" ] || fail "no JSON of refrag bench"
tail -n 1 "$home/said" | grep -q "gpu-check quick: passed" || fail "the last line is another"
[ "$(grep -n -- '---- steps' "$home/said" | cut -d: -f1)" -gt "$(grep -n 'racecheck: passed' "$home/said" | head -n 1 | cut -d: -f1)" ] ||
    fail "the tables do not come last"

quick "a second call after a good one has nothing to do"
expect 0
has "tests: passed (before: "
[ ! -e "$home/out/bench.md" ] || fail "it measured again"

fresh
rm "$torch/libcublas.so.12" "$home/cuda/lib64/libcublas.so"
quick "what hangs is killed, and the rest goes on" FAKE_TESTS=hang FAKE_BENCH1=hang GPU_QUICK_LIMITS="tests=1 bench1=1"
expect 1
has "tests: STOPPED"
has "bench1: STOPPED"
has "bench8: passed"
has "racecheck: passed"
has "NOT passed: 2 failed, 0 had no time"
# shellcheck disable=SC2009
! ps -eo args | grep -F "$bin" | grep -qv grep || fail "processes were left behind"
touch "$torch/libcublas.so"
quick "the second call does again what was stopped"
expect 0
has "tests: passed ("
has "bench8: passed (before: "
grep -qx "tests with $torch/libcublas.so" "$home/out/quick.txt" || fail "no cuBLAS without a number"

fresh
touch "$torch/libcublas.so.12" "$home/cuda/lib64/libcublas.so.13"
quick "no time for all" GPU_CHECK_SECONDS=15
expect 1
has "NOT passed: 0 failed, 11 had no time"
has "memcheck: no time"
{
    echo "sources $(cat "$home/carry/sources")"
    for step in probe binaries run bench1 bench8 bench_cuda sdpa; do echo "$step 1 passed"; done
    echo "tests 80 STOPPED"
} >"$home/dir/gpu-quick.state"
quick "the second call does the rest, then what was stopped" FAKE_SANITIZER=fail
expect 1
has "run: passed (before: 1 s"
has "ncu: passed"
has "memcheck: FAILED,3"
has "tests: passed ("
has "NOT passed: 2 failed, 0 had no time"
[ "$(grep -n 'ncu: passed' "$home/said" | head -n 1 | cut -d: -f1)" -lt "$(grep -n 'tests: passed' "$home/said" | head -n 1 | cut -d: -f1)" ] ||
    fail "what failed comes before what never ran"
grep -qF "cuBLAS:  $home/cuda/lib64/libcublas.so.13" "$home/out/quick.txt" || fail "not CUDA's own cuBLAS"
quick "steps that are named" GPU_QUICK_STEPS="run memcheck racecheck"
expect 0
has "run: passed ("
quick "a step that there is not" GPU_QUICK_STEPS="walk"
expect 1
has 'no step "walk"'

fresh
quick "another text on the GPU is a warning" FAKE_TEXT=cellos
expect 0
has "warning: run: the text on the GPU is another than on the CPU"

fresh
quick "no GPU" FAKE_GPU=none
expect 1
has "probe: FAILED,1"
has_not "tests: passed"

fresh
mv "$home/tools/ncu" "$home/tools/compute-sanitizer" "$home/"
quick "no profiler, no sanitizer"
expect 0
has "ncu: SKIP"
has "racecheck: SKIP"
mv "$home/ncu" "$home/compute-sanitizer" "$home/tools/"

fresh
quick "what was carried does not run: it is built here" FAKE_BINARIES=broken
expect 0
has "the carried binaries do not run here"
grep -q "made with .*CUDA_ARCHS=90a CUDA_PTX= STORE=0 EDIT=0 WERROR=0 .*refrag-tests.*, -isystem $home/dir/carry/include" "$home/out/quick.txt" ||
    fail "built otherwise"
echo other >"$home/carry/sources"
fresh
mv "$home/tools/nvcc" "$home/"
quick "what was carried is of other sources, and nothing to build with"
expect 1
has "no carried binaries of these sources"
has "nothing to build with"

scenario="what nvcc is called with"
dry_run() {
    env -u MAKEFLAGS -u MFLAGS -u MAKEOVERRIDES -u MAKELEVEL make --no-print-directory -n V=1 SAN= CONFIG=release NVCC=/stub/nvcc BUILD="$home/none" "$@" 2>/dev/null
}
nvcc_line() { dry_run CUDA=auto "$@" "$home/none/obj/cuda/rope.o" | grep '^/stub/nvcc'; }
all="-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90 -Isrc"
nvcc_line | grep -qF -- "-Werror all-warnings -Xcompiler -Wall,-Wextra,-pthread,-fPIC $all" || fail "by default: $(nvcc_line)"
nvcc_line CUDA_ARCHS=90a CUDA_PTX= WERROR=0 | tr -s ' ' | grep -qF -- "-Xcompiler -Wall,-Wextra,-pthread,-fPIC -gencode arch=compute_90a,code=sm_90a -Isrc" ||
    fail "for what is carried: $(nvcc_line CUDA_ARCHS=90a CUDA_PTX= WERROR=0)"

scenario="what is carried needs the C library alone"
libraries=$(dry_run CUDA=0 STATIC=1 "$home/none/refrag" | tail -n 1 | grep -oE -- ' -l[^ ]+' | tr -d '\n')
[ "$libraries" = " -l:libutf8proc.a" ] || fail "linked with$libraries"

scenario="the table of expected seconds"
bash bench/gpu_quick.sh --table | while IFS= read -r line; do
    grep -qxF -- "$line" cuda/README.md || echo "$line"
done >"$home/said"
[ ! -s "$home/said" ] || fail "cuda/README.md lacks $(cat "$home/said")"

[ "$failures" -eq 0 ] && echo "gpu_check_rehearsal: passed"
exit $((failures > 0))
