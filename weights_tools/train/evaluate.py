"""Measures a model directory with its stored (bf16) weights, computing in fp32: log-perplexity and questions.

`perplexity` has the definitions of src/refrag/perplexity.h, so that its figures can be held beside `refrag eval perplexity`:
    python -m weights_tools.train.evaluate perplexity -m DIR --text FILE --context 256 --output 128 -k 8,16 -p 0,0.25
`questions` asks a source of tasks.py (facts: held-out names) with distractor passages:
    python -m weights_tools.train.evaluate questions -m DIR --source facts --distractors 0,4,9 -k 16 -p 0.25 --limit 200
Both are for watching a training run; the figures of the model's card come from `refrag eval`.
"""
import argparse
import json
import math
import re
import string
from collections import Counter

import numpy as np
import torch

from .batches import Qa, Segments
from .export import load_directory
from .imitation import policy_logits
from .model import BOS, EOS, MixedBatch, chunked, n_expand
from .sft import Task
from .tasks import Facts, open_source


def row_means(model, batch):
    losses, counts = batch.losses(model)
    return [part.double().mean().item() for part in losses.split(counts.tolist())]


def chunk_surprise(model, chunks):
    """Mean negative log-likelihood of each chunk when the decoder reads it alone after <s>."""
    batch = MixedBatch()
    for c in chunks:
        batch.add_row([("tokens", [BOS]), ("target", c)])
    return torch.tensor(row_means(model, batch))


def choose(model, policy, chunks, question, k, p, rng):
    """The set of expanded chunks: the n largest scores, lower index first."""
    n = n_expand(p, len(chunks))
    if policy == "none" or n == 0:
        return set()
    if policy == "all":
        return set(range(len(chunks)))
    if policy == "random":
        return set(rng.permutation(len(chunks))[:n].tolist())
    if policy == "model":
        with torch.no_grad():
            scores = policy_logits(model, [(chunks, question)], k)[0]
    else:
        scores = chunk_surprise(model, chunks) * (1 if policy == "perplexity-desc" else -1)
    return set(torch.sort(scores, descending=True, stable=True).indices[:n].tolist())


def log_perplexity(model, windows, context, mode, k, p, policy, group=16):
    """Mean over windows of the targets' mean negative log-likelihood, and its standard error."""
    means, rng = [], np.random.default_rng(0)
    for begin in range(0, len(windows), group):
        batch = MixedBatch()
        for ids in windows[begin : begin + group]:
            past, target = ids[:context], ids[context:]
            pieces = [("tokens", past)]
            if mode == "none":
                pieces = []
            elif mode == "last":
                n = -(-context // k)
                t = n_expand(p, n)
                pieces = [("tokens", past[-(n - t + k * t) :])]
            elif mode == "refrag":
                chunks = chunked(past, k)
                expanded = choose(model, policy, chunks, [], k, p, rng)
                pieces = [("tokens", c) if i in expanded else ("slot", batch.chunk(c)) for i, c in enumerate(chunks)]
            batch.add_row([("tokens", [BOS]), *pieces, ("target", target)])
        means += row_means(model, batch)
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means)))


def perplexity(args, model):
    segments = Segments(f"{args.model}/decoder/tokenizer.json")
    ids = segments(open(args.text, encoding="utf-8").read())
    size = args.context + args.output
    windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: args.limit]
    rows = []

    def add(mode, k=None, p=None, policy=None):
        value, error = log_perplexity(model, windows, args.context, mode, k, p, policy)
        rows.append({"mode": mode, "context": args.context, "output": args.output, "k": k, "p": p, "policy": policy, "log_perplexity": value,
                     "standard_error": error, "share_recovered": None, "n": len(windows)})

    add("none")
    add("full")
    none, full = (r["log_perplexity"] for r in rows)
    for k in args.k:
        for p in args.p:
            add("last", k, p)
            for policy in args.policy if p > 0 else ["none"]:
                add("refrag", k, p, policy)
    for r in rows:
        r["share_recovered"] = (none - r["log_perplexity"]) / (none - full)
        print(json.dumps(r), flush=True)


def generate(model, pieces, chunks, limit=24):
    """Greedy continuation of one row, without the end token."""
    batch = MixedBatch()
    batch.chunks = chunks
    batch.add_row(pieces)
    ids, _, slot_at, chunk_of = batch.tensors()
    x = model.decoder.model.embed_tokens(ids)
    if len(slot_at):
        x[0, slot_at] = model.projector(model.encode(chunks))[chunk_of]
    out, cache, inputs = [], None, {"inputs_embeds": x}
    while len(out) < limit:
        step = model.decoder(**inputs, past_key_values=cache, use_cache=True)
        token, cache = int(step.logits[0, -1].argmax()), step.past_key_values
        if token == EOS:
            break
        out.append(token)
        inputs = {"input_ids": torch.tensor([[token]])}
    return out


def normalised(text):
    """SQuAD's way: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer, truth):
    a, b = normalised(answer), normalised(truth)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else float(a == b)


def questions(args, model, refrag):
    segments = Segments(f"{args.model}/decoder/tokenizer.json")
    qa = Qa(segments, refrag["template"])
    source = Facts("test", no_answer=0.0, follow_up=0.0) if args.source == "facts" else open_source(args.folder, args.source)
    for k in args.k:
        for n_distractors in args.distractors:
            for policy, p in [("none", 0.0), *[(name, p) for p in args.p if p > 0 for name in args.policy], ("all", 1.0)]:
                rng, exact, overlap, found, skipped, shown = np.random.default_rng(args.seed), 0, 0.0, 0, 0, []
                for i in range(args.limit):
                    passages, gold, qas = source.task(rng, n_distractors + 1)
                    question, answer = qas[rng.integers(len(qas))]
                    task = Task(qa, passages, [(question, answer, gold)], chunked, k)
                    expanded = choose(model, policy, task.chunks, segments(question), k, p, np.random.default_rng(i))
                    batch = MixedBatch()
                    pieces = task.context(batch, expanded, BOS, qa.suffix) + [("tokens", task.qas[0][1])]
                    if sum(len(v) if t != "slot" else 1 for t, v in pieces) + 24 > 2048:
                        skipped += 1
                        continue
                    said = segments.tokenizer.decode(generate(model, pieces, batch.chunks)).removeprefix(" ")
                    exact += normalised(said) == normalised(answer)
                    overlap += f1(said, answer)
                    found += set(task.qas[0][3]) <= expanded
                    shown.append((question, answer, said))
                n = args.limit - skipped
                print(json.dumps({"source": args.source, "k": k, "distractors": n_distractors, "policy": policy, "p": p, "exact_match": exact / n,
                                  "f1": overlap / n, "answer_expanded": found / n, "n": n}), flush=True)
                for line in shown[: args.show]:
                    print("   ", line)


def numbers(kind):
    return lambda text: [kind(t) for t in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["perplexity", "questions"])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("-k", type=numbers(int), default=[8, 16])
    parser.add_argument("-p", type=numbers(float), default=[0.0])
    parser.add_argument("--policy", type=numbers(str), default=["model", "random", "perplexity-desc"])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--source", default="facts")
    parser.add_argument("--folder", default="build/train/data", help="where prepare.py put the other sources")
    parser.add_argument("--distractors", type=numbers(int), default=[0, 4, 9])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--show", type=int, default=0, help="how many answers of each row to print")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, refrag = load_directory(args.model)
    with torch.no_grad():
        perplexity(args, model) if args.what == "perplexity" else questions(args, model, refrag)


if __name__ == "__main__":
    main()
