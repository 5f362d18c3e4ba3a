#!/usr/bin/env bash
# Other people's tools against `refrag serve`: schemathesis reads /openapi.json and sends what it allows and what it does
# not; lm-eval scores two-choice questions by log-likelihood and lets the model answer them; guidellm loads it with
# streams. A server of its own for each, results in bench/results/serve/. Minutes on two cores; no network.
#
#     python3 -m venv VENV && VENV/bin/pip install -r weights_tools/requirements-serve.txt
#     bench/serve_tools.sh VENV [schemathesis|lm-eval|guidellm ...]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ ! -x "$1/bin/python" ]; then
    echo "usage: bench/serve_tools.sh VENV [schemathesis|lm-eval|guidellm ...]" >&2
    exit 2
fi
venv=$(cd "$1" && pwd)
shift
tools=("$@")
[ $# -gt 0 ] || tools=(schemathesis lm-eval guidellm)
refrag=${REFRAG:-build/refrag}
model=weights_tools/refrag-nano
results=bench/results/serve
mkdir -p "$results"
work=$(mktemp -d)
server=
stop() {
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
    server=
}
trap 'stop; rm -rf "$work"' EXIT
# The tools look for models and for news of themselves on the network; what they need is here.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HOME=$work/huggingface

serve() { # options of refrag serve; sets url
    "$refrag" serve -m "$model" --port 0 "$@" 2>"$work/server" &
    server=$!
    for ((i = 0; i < 600; i++)); do
        url=$(sed -n 's/^refrag: serving .* on \(http:[^ ]*\) .*/\1/p' "$work/server")
        [ -z "$url" ] || return 0
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/server" >&2
    exit 1
}

still_healthy() {
    curl -sSf -o "$work/health" "$url/health" || { echo "$1: the server does not answer afterwards" >&2; exit 1; }
}

# Positions are few so that an answer without max_tokens is short, the queue is long so that n = 128 fits.
# Not among the checks: positive_data_acceptance, since a description cannot say all that a request must be (messages
# in turn, ids within the vocabulary, top_logprobs beside logprobs).
run_schemathesis() {
    serve -c 256 --queue 1000 --api-key schemathesis
    local failed=0
    (cd "$work" && "$venv/bin/schemathesis" --no-color run "$url/openapi.json" -H "Authorization: Bearer schemathesis" \
        --exclude-checks positive_data_acceptance --max-examples "${EXAMPLES:-100}" --seed 1 --continue-on-failure \
        --output-sanitize false) >"$work/schemathesis" || failed=$?
    still_healthy schemathesis
    stop
    sed "s|$url|URL|g" "$work/schemathesis" >"$results/schemathesis.txt"
    tail -n 3 "$results/schemathesis.txt"
    [ "$failed" = 0 ] || echo "schemathesis: failed: $results/schemathesis.txt" >&2
    return "$failed"
}

write_tasks() {
    mkdir "$work/tasks"
    "$venv/bin/python" - "$work/tasks" <<'PYTHON'
import json, sys
folder = sys.argv[1]
passages = [json.loads(line) for line in open("bench/demo/passages.jsonl", encoding="utf-8")]
pairs = [line.rstrip("\n").split("|") for line in open("bench/demo/questions.txt", encoding="utf-8") if "|" in line]
context = "".join(passage["text"] + "\n" for passage in passages)
rows = []
for question, answer in pairs:
    prompt = f"{context}Question: {question}\nAnswer:"  # the model's template
    for _, wrong in pairs:
        if wrong != answer:
            choices = [f" {one}" for one in ([answer, wrong] if len(rows) % 2 == 0 else [wrong, answer])]
            rows.append({"prompt": prompt, "choices": choices, "label": choices.index(f" {answer}"), "answer": answer})
with open(f"{folder}/two_choices.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
with open(f"{folder}/answers.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows[:: len(pairs) - 1])
TASK = """task: refrag_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
"""
with open(f"{folder}/two_choices.yaml", "w", encoding="utf-8") as file:
    file.write(TASK.format(name="two_choices", kind="multiple_choice", folder=folder) + """doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""")
with open(f"{folder}/answers.yaml", "w", encoding="utf-8") as file:
    file.write(TASK.format(name="answers", kind="generate_until", folder=folder) + """doc_to_target: answer
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 16, temperature: 0}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true}]
""")
PYTHON
}

# Log-likelihoods need to know where the context ends, in tokens: lm-eval reads the model's tokenizer and sends ids.
# Without a tokenizer it only generates, and sends text.
run_lm_eval() {
    write_tasks || return 1
    serve
    local common="model=refrag-nano,base_url=$url/v1/completions,num_concurrent=4,max_retries=1"
    local failed=0
    "$venv/bin/lm_eval" run --model local-completions --include_path "$work/tasks" --tasks refrag_two_choices,refrag_answers \
        --model_args "$common,tokenizer_backend=huggingface,tokenizer=$model/decoder,max_length=2048" \
        --output_path "$work/ids" >"$work/lm-eval" 2>&1 || failed=1
    "$venv/bin/lm_eval" run --model local-completions --include_path "$work/tasks" --tasks refrag_answers \
        --model_args "$common,tokenizer_backend=None" --output_path "$work/text" >>"$work/lm-eval" 2>&1 || failed=1
    still_healthy lm-eval
    stop
    if [ "$failed" != 0 ]; then
        tail -n 30 "$work/lm-eval" >&2
        echo "lm-eval: failed" >&2
        return 1
    fi
    grep '^|' "$work/lm-eval" | tee "$results/lm-eval.txt"
}

run_guidellm() {
    serve
    "$venv/bin/guidellm" run --disable-progress \
        --backend "kind=openai_http,target=$url,model=refrag-nano,request_format=/v1/chat/completions" \
        --profile kind=concurrent,streams=1 --override profile.streams 1,4,16 --constraint "kind=max_requests,count=${REQUESTS:-64}" \
        --tokenizer "kind=huggingface_auto,model=$model/decoder" \
        --data kind=synthetic_text,prompt_tokens=200,output_tokens=32 --output kind=console \
        --output "kind=json,path=$work/guidellm.json" >"$work/guidellm" 2>&1 || { tail -n 30 "$work/guidellm" >&2; return 1; }
    still_healthy guidellm
    stop
    "$venv/bin/python" - "$work/guidellm.json" <<'PYTHON' || return 1
import json, sys
runs = json.load(open(sys.argv[1], encoding="utf-8"))["benchmarks"]
for run in runs:
    totals = run["metrics"]["request_totals"]
    print("guidellm:", totals["successful"], "answered,", totals["incomplete"], "cut off at the end,", totals["errored"], "failed")
sys.exit(any(run["metrics"]["request_totals"]["errored"] for run in runs))
PYTHON
    # The tables that it printed last, without the log between them.
    awk '/Run Summary Info/ { tables = "" } /^[|]/ || /^ℹ/ || /^$/ { tables = tables $0 "\n" } END { printf "%s", tables }' \
        "$work/guidellm" | cat -s >"$results/guidellm.txt"
}

failed=0
for tool in "${tools[@]}"; do
    case $tool in
        schemathesis) run_schemathesis || failed=1 ;;
        lm-eval) run_lm_eval || failed=1 ;;
        guidellm) run_guidellm || failed=1 ;;
        *) echo "serve_tools: expected schemathesis, lm-eval or guidellm, found $tool" >&2; exit 2 ;;
    esac
    stop
done
exit $failed
