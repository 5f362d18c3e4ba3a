#!/usr/bin/env bash
# Builds what `make gpu-check PART=quick` runs on a machine that has a GPU but perhaps no compiler or headers, and packs
# it into one file, build/carry.tar.gz:
#
#   bin/       refrag, refrag-tests and bench_cuda for sm_90a, stripped; of libraries only the C library is not linked in
#   include/   the headers that a build there needs (doctest, nlohmann/json, CLI11, utf8proc), lib/ its static library
#   commit, sources   the commit, and a digest of all that is compiled: quick takes no binaries of other sources
#
#   bench/gpu_carry.sh       builds and packs; prints sizes, fails where tree and file together pass 60 MiB
#   bench/gpu_carry.sh id    the digest alone
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
build=build/carry-build
most_bytes=$((60 << 20))

sources_id() {
    find src cuda bench tests Makefile VERSION -type f \
        \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name Makefile -o -name VERSION \) \
        -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16
}
if [ "${1:-}" = id ]; then
    sources_id
    exit
fi

make --no-print-directory -j"$(nproc)" BUILD=$build CUDA_ARCHS=90a CUDA_PTX= STATIC=1 \
    $build/refrag $build/refrag-tests $build/bench_cuda
grep -q 'cuda yes' $build/obj/with-parts || {
    echo "gpu-check carry: this build has no CUDA backend (is nvcc there?)" >&2
    exit 1
}
to=build/carry
rm -rf $to
mkdir -p $to/bin $to/include $to/lib
for binary in refrag refrag-tests bench_cuda; do
    strip -o $to/bin/$binary $build/$binary
    others=$(ldd $to/bin/$binary | grep -vE '^\s*(linux-vdso|lib(c|m|dl|rt|pthread)\.so|/lib.*ld-linux)' || true)
    [ -z "$others" ] || {
        echo "gpu-check carry: $binary needs libraries that may not be there: $others" >&2
        exit 1
    }
done
for header in doctest/doctest.h nlohmann/json.hpp CLI/CLI.hpp utf8proc.h; do
    from=/usr/include/$header
    if [ "${header%/*}" = "$header" ]; then cp "$from" $to/include/; else cp -r "${from%/*}" $to/include/; fi
done
cp "$(${CXX:-g++} -print-file-name=libutf8proc.a)" $to/lib/
git rev-parse --short HEAD >$to/commit 2>/dev/null || echo unknown >$to/commit
sources_id >$to/sources
tar -C build -czf build/carry.tar.gz carry

bytes_of() { du -cb "$@" | tail -n 1 | cut -f 1; }
tree=$(git ls-files -co --exclude-standard -z | xargs -0 du -cb | awk '$2 == "total" { sum += $1 } END { print sum }')
packed=$(bytes_of build/carry.tar.gz)
mib() { awk "BEGIN { printf \"%.1f MiB\", $1 / 1048576 }"; }
for file in $to/bin/* $to/include $to/lib; do echo "  $(mib "$(bytes_of "$file")")  $file"; done
echo "what travels: the tree $(mib "$tree") and build/carry.tar.gz $(mib "$packed"), together $(mib $((tree + packed))) of" \
    "$(mib $most_bytes) allowed"
[ $((tree + packed)) -le $most_bytes ] || {
    echo "gpu-check carry: too much to travel" >&2
    exit 1
}
