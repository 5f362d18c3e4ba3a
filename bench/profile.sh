#!/bin/sh
# Where a prefill's time goes: the default decoder shape reads N tokens as tokens, ROUNDS times, under `perf record`;
# samples are sorted by function into matrix products, attention, what lies between them, and threads that wait.
# Loading, the measurement of the machine's peaks and the products of the token that each round generates are left out. Needs
# Linux's perf and a binary with symbols.
#
#     bench/profile.sh [N [ROUNDS [further options of refrag bench]]]
set -eu
n=${1:-512}
rounds=${2:-100}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] && shift
refrag=${REFRAG_BINARY:-build/refrag}
data=$(mktemp)
trap 'rm -f "$data"' EXIT
perf record -q -F 2000 -o "$data" "$refrag" bench --context "$n" --modes full --from cached -n 2 --repeats "$rounds" \
    --row-seconds 600 "$@" >&2
perf report -i "$data" --no-children --stdio --percent-limit 0 -F overhead,dso,symbol -t ';' 2>/dev/null |
    awk -F';' '
        /^#/ || NF < 3 { next }
        {
            share = $1 + 0
            name = $3
            if (name ~ /multiply<[12], [124]>|gemm_bf16_vectors|Bf16Weights, 1, |Sampler|Meter|fp32_|bf16_a|int8_a|random_|make_matrix|pack_row|Json|Tokenizer/)
                next
            else if (name ~ /gemm_|tile<|tile_of|widen_panel|linear_act|pack_bf16|pack_int8|quantize_groups|write_sums|read_sums|products_packed|multiply_/) class = "matrix products"
            else if (name ~ /attend|attention|softmax|pack_kv|::scale$|finish|transpose_keys/) class = "attention"
            else if (name ~ /silu_mul|rms_norm|rope|::add$|gelu|embed|copy_row/) class = "between them"
            else if (name ~ /ThreadPool/) class = "waiting"
            else next
            sum[class] += share
            all += share
            line[++lines] = class ";" name ";" share
        }
        END {
            split("matrix products;attention;between them;waiting", order, ";")
            for (i = 1; i <= 4; ++i) printf "| %s | %.3f |\n", order[i], sum[order[i]] / all
            for (i = 1; i <= lines; ++i) {
                split(line[i], part, ";")
                if (part[3] / all > 0.004) printf "%-16s %.3f %s\n", part[1], part[3] / all, part[2]
            }
        }'
