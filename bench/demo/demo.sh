#!/usr/bin/env bash
# The demonstration behind `make demo`: asks every question of questions.txt over passages.jsonl twice, with REFRAG
# (compress, sense, expand) and with the full context as tokens, from the same weights. The summary lines say how many
# chunks there were and were expanded, how many decoder positions stand for how many tokens, and the time to first token.
# Then all questions once more in one run each. From the second on, REFRAG finds the passages encoded, and the full context
# finds the prompt's beginning read: its pages are kept (prefix cache), so its time to first token there is no reading time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
refrag=${REFRAG:-build/refrag}
model=${REFRAG_MODEL:-$here/../../weights_tools/refrag-nano}
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT

echo "Passages:"
sed 's/^.*"title": "\([^"]*\)", "text": "\(.*\)"}$/  [\1] \2/' "$here/passages.jsonl" | cut -c1-110 | sed 's/$/.../'
echo
questions=()
while IFS='|' read -r question expected; do
    [ -n "$question" ] || continue
    questions+=(-q "$question")
    echo "Q: $question"
    for policy in model all; do
        [ "$policy" = model ] && label="REFRAG      " || label="full context"
        answer=$("$refrag" run -m "$model" --passages "$here/passages.jsonl" -q "$question" --policy "$policy" -n 32 \
            2>"$summary")
        echo "   $label  $answer"
        echo "                 $(cat "$summary")"
    done
    echo "   (the passages say: $expected)"
    echo
done <"$here/questions.txt"

for policy in model all; do
    [ "$policy" = model ] && echo "All questions in one run, REFRAG (the passages stay encoded):" ||
        echo "All questions in one run, full context (the prompt's beginning stays in the KV cache):"
    "$refrag" run -m "$model" --passages "$here/passages.jsonl" "${questions[@]}" --policy "$policy" -n 32 2>&1 >/dev/null |
        sed 's/^/   /'
done
