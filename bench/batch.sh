#!/usr/bin/env bash
# Continuous batching against one request after another: 64 requests (the demo's questions over its passages, again and
# again) with --parallel 1 and 8 in turn, three rounds; 64 tokens each, then to the end token. Prints refrag's summaries.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mapfile -t questions < <(cut -d'|' -f1 bench/demo/questions.txt | grep .)
for ((i = 0; i < 64; i++)); do
    printf '{"id": %d, "question": "%s"}\n' "$i" "${questions[i % ${#questions[@]}]}"
done >"$work/requests.jsonl"
for length in "--ignore-eos -n 64" "-n 64"; do
    for round in 1 2 3; do
        for parallel in 1 8; do
            # shellcheck disable=SC2086
            build/refrag run -m weights_tools/refrag-nano --passages bench/demo/passages.jsonl \
                --batch "$work/requests.jsonl" --parallel $parallel $length -o "$work/$parallel.jsonl" 2>"$work/summary"
            echo "$length, round $round, --parallel $parallel: $(tail -n 1 "$work/summary")"
        done
        # Times differ; the answers must not.
        for parallel in 1 8; do
            sed 's/, "ttft_ms".*//; s/"n_cached": [0-9]*//' "$work/$parallel.jsonl" >"$work/$parallel.answers"
        done
        cmp "$work/1.answers" "$work/8.answers"
    done
done
