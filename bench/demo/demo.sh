#!/usr/bin/env bash
# The demonstration behind `make demo`: asks every question of questions.txt over passages.jsonl twice, with REFRAG
# (compress, sense, expand) and with the full context as tokens, from the same weights. The summary lines say how many
# chunks there were and were expanded, how many decoder positions stand for how many tokens, and the time to first token.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
refrag=${REFRAG:-build/refrag}
model=${REFRAG_MODEL:-$here/../../weights_tools/refrag-nano}

echo "Passages:"
sed 's/^.*"title": "\([^"]*\)", "text": "\(.*\)"}$/  [\1] \2/' "$here/passages.jsonl" | cut -c1-110 | sed 's/$/.../'
echo
while IFS='|' read -r question expected; do
    [ -n "$question" ] || continue
    echo "Q: $question"
    for policy in model all; do
        [ "$policy" = model ] && label="REFRAG      " || label="full context"
        answer=$("$refrag" run -m "$model" --passages "$here/passages.jsonl" -q "$question" --policy "$policy" -n 32 \
            2>"${TMPDIR:-/tmp}/refrag-demo.$$")
        echo "   $label  $answer"
        echo "                 $(cat "${TMPDIR:-/tmp}/refrag-demo.$$")"
        rm -f "${TMPDIR:-/tmp}/refrag-demo.$$"
    done
    echo "   (the passages say: $expected)"
    echo
done <"$here/questions.txt"
