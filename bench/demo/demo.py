#!/usr/bin/env python3
"""The demonstration behind `make demo`: the same questions over the same passages with the full context as tokens and with REFRAG, from the same
weights; answers, time to first token and decoder positions side by side, and a table at the end.

    python3 bench/demo/demo.py [--refrag build/refrag] [--model DIR] [--data DIR]

Without --model the default model is set up (weights_tools/set_up_smol.py: fetched once). Where that fails the small model in the repository answers over
six short passages instead. Each question runs in a process of its own, so nothing is kept between them. Needs Python alone.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "weights_tools/refrag-nano"
ISLES, SIX = ROOT / "bench/demo/isles", ROOT / "bench/demo"


def default_model():
    """(model directory, folder of passages and questions)"""
    out = ROOT / "build/refrag-smol"
    run = subprocess.run([sys.executable, ROOT / "weights_tools/set_up_smol.py", "--out", out])
    if run.returncode == 0:
        return out, ISLES
    print("The default model could not be set up (see above): the small one in the repository answers instead, over six short passages.", flush=True)
    return NANO, SIX


def ways_of(model):
    """[(name, options)], the full context first."""
    config = json.loads((model / "refrag.json").read_text())
    p = config["expand_fraction"]
    full = ("full context", ["--policy", "all"])
    if "encoder" not in config:
        return [full, (f"best {p:.0%} of the chunks", [])]
    return [full, (f"REFRAG, {p:.0%} expanded", [])]


def ask(refrag, model, passages, question, options):
    command = [refrag, "run", "-m", model, "--passages", passages, "-q", question, "-n", "32", "--stop", "\n", "--json", *options]
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"demo: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout)


def said(answer, expected):
    """Whether the expected words stand in the answer."""
    return " ".join(expected.lower().split()) in " ".join(answer.lower().split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--refrag", default=ROOT / "build/refrag")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="a folder with passages.jsonl and questions.txt (question|answer)")
    args = parser.parse_args()
    model, data = (args.model, ISLES) if args.model else default_model()
    data = args.data or data
    passages = data / "passages.jsonl"
    questions = [line.split("|") for line in (data / "questions.txt").read_text().splitlines() if line.strip()]
    ways = ways_of(model)
    width = max(len(name) for name, _ in ways)

    lines = passages.read_text().splitlines()
    print(f"{len(lines)} passages, the first: {json.loads(lines[0])['text'][:90]}...\n", flush=True)
    results = {name: [] for name, _ in ways}
    for question, expected in questions:
        print(f"Q: {question}", flush=True)
        for name, options in ways:
            answer = ask(args.refrag, model, passages, question, options)
            results[name].append((said(answer["answer"], expected), answer))
            print(f"   {name:{width}}  {answer['answer']}  ({answer['ttft_ms']:.0f} ms)", flush=True)
        print(f"   {'(in the passages':{width}}  {expected})")

    print(f"\n{'':{width}}  answers right   time to first token   decoder positions")
    base = None
    for name, _ in ways:
        found = results[name]
        ttft = statistics.median(answer["ttft_ms"] for _, answer in found)
        positions = statistics.median(answer["positions"] for _, answer in found)
        base = base or ttft
        right = sum(ok for ok, _ in found)
        print(f"{name:{width}}  {right:>3} of {len(found):<10} {ttft:>7.0f} ms ({base / ttft:.1f}x)   {positions:>10.0f}")


if __name__ == "__main__":
    main()
