#!/usr/bin/env python3
"""What a store saves the reader of passages: time to first token of the same questions, three ways in turn.

    python3 bench/ask_run.py -m weights_tools/refrag-nano [--data bench/demo] [--top 8] [--rounds 5] [--refrag build/refrag]

full: `run`, every passage as tokens. run: `run` with the model's own choice, from text. ask: `ask` from a store of the same passages; retrieving counts.
Each question is a process of its own; loading the model does not count. Medians over questions and rounds. Prints Markdown; needs Python alone.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path


def run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"ask_run: {done.stderr.strip()}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", type=Path, default=Path("bench/demo"))
    parser.add_argument("--top", type=int, nargs="+", default=[8, 40])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--refrag", default="build/refrag")
    args = parser.parse_args()
    questions = [line.split("|")[0] for line in (args.data / "questions.txt").read_text().splitlines() if line.strip()]
    passages = args.data / "passages.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.db"
        run([args.refrag, "index", store, passages, "-m", args.model])
        common = ["-m", args.model, "-n", 1, "--json", "-q"]
        ways = {"full": ["run", "--passages", passages, "--policy", "all", *common], "run": ["run", "--passages", passages, *common]}
        for top in args.top:
            ways[f"ask, best {top}"] = ["ask", store, "--top", top, *common]
        ms = {way: [] for way in ways}
        positions = {way: [] for way in ways}
        for _ in range(args.rounds):
            for question in questions:
                for way, command in ways.items():
                    answer = json.loads(run([args.refrag, *command, question]))
                    ms[way].append(answer["ttft_ms"] + answer.get("retrieve_ms", 0.0))
                    positions[way].append(answer["positions"])
    full = statistics.median(ms["full"])
    print("| way | decoder positions | TTFT ms | faster than full |\n|---|---|---|---|")
    for way, values in ms.items():
        middle = statistics.median(values)
        print(f"| {way} | {statistics.median(positions[way]):.0f} | {middle:.1f} | {full / middle:.1f}x |")


if __name__ == "__main__":
    main()
