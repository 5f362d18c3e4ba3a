#!/usr/bin/env python3
"""Measures a passage store: how fast it is built, how large it is, how long a question takes.

    python3 bench/store.py -m weights_tools/refrag-nano --texts DIR [--passages 100000] [--refrag build/refrag] [--store FILE] [--queries 200]

DIR holds plain texts (.txt), which are cut at blank lines into passages of 80 words; when they are used up they come again with a number in
front, so that every text is another one. Queries are runs of eight words from passages. Prints Markdown; needs Python alone.
"""
import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

WORDS = 80


def passages_of(folder, n):
    """n passages, in the order of the texts."""
    texts = [p.read_text(encoding="utf-8", errors="replace").split() for p in sorted(Path(folder).rglob("*.txt"))]
    texts = [words for words in texts if len(words) > WORDS]
    if not texts:
        raise SystemExit(f"{folder}: expected .txt files, found none")
    made, turn = 0, 0
    while made < n:
        for words in texts:
            for at in range(0, len(words) - WORDS, WORDS):
                if made == n:
                    return
                text = " ".join(words[at : at + WORDS])
                yield text if turn == 0 else f"{turn}. {text}"
                made += 1
        turn += 1


def run(command, **options):
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--passages", type=int, default=100000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--store", help="keep the store here; one that is there is not built again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, store = Path(folder) / "corpus.jsonl", Path(args.store or f"{folder}/store.db")
        texts = list(passages_of(args.texts, args.passages))
        with open(corpus, "w", encoding="utf-8") as out:
            for i, text in enumerate(texts):
                out.write(json.dumps({"id": str(i), "text": text, "part": i % 100}, ensure_ascii=False) + "\n")
        print("| what | figure |\n|---|---|", flush=True)
        if not store.exists():
            begun = time.monotonic()
            built = run([args.refrag, "index", store, corpus, "-m", args.model, "--passage-tokens", 256])
            seconds = time.monotonic() - begun
            print(f"| built | {args.passages} passages in {seconds:.0f} s, {args.passages / seconds:.0f} passages/s |", flush=True)
            print(f"| says | {built.stderr.strip().splitlines()[-1].replace('|', ';')} |", flush=True)
        begun = time.monotonic()
        run([args.refrag, "index", store, corpus, "-m", args.model, "--passage-tokens", 256])
        print(f"| once more, nothing changed | {time.monotonic() - begun:.1f} s |", flush=True)
        stats = json.loads(run([args.refrag, "index", store, "--stats", "--json"]).stdout)
        print(f"| store | {stats['store_bytes'] / 1e6:.0f} MB, {stats['store_bytes'] / stats['passages']:.0f} bytes a passage: text "
              f"{stats['text_bytes'] / stats['passages']:.0f}, record {stats['record_bytes'] / stats['passages']:.0f} |", flush=True)
        draw = random.Random(5)
        questions = []
        for _ in range(args.queries):
            words = draw.choice(texts).split()
            at = draw.randrange(len(words) - 8)
            questions += ["-q", " ".join(words[at : at + 8])]
        for way in ("bm25", "dense", "both"):
            lines = run([args.refrag, "ask", store, "-m", args.model, "--json", "-n", 1, "--retrieve", way, *questions]).stdout.splitlines()
            ms = [json.loads(line)["retrieve_ms"] for line in lines]
            print(f"| {way}: the first question | {ms[0]:.1f} ms |")
            print(f"| {way}: further ones | p50 {statistics.median(ms[1:]):.1f} ms, p99 {quantile(ms[1:], .99):.1f} ms |", flush=True)
        lines = run([args.refrag, "ask", store, "-m", args.model, "--json", "-n", 1, "--where", "part=7", *questions]).stdout.splitlines()
        ms = [json.loads(line)["retrieve_ms"] for line in lines]
        print(f"| both, --where part=7 (1%): further ones | p50 {statistics.median(ms[1:]):.1f} ms, p99 {quantile(ms[1:], .99):.1f} ms |")


if __name__ == "__main__":
    main()
