#!/usr/bin/env python3
"""What it costs to keep chunk embeddings in fewer bits: answers and size with `--cache-type` f32, bf16 and int8.

    python3 bench/cache_types.py -m weights_tools/refrag-nano --data QUESTIONS.jsonl [--limit 500] [--refrag build/refrag] [RUN OPTIONS]

QUESTIONS.jsonl has lines of {"question", "text", "answers"}, as `refrag eval qa` reads them. Each question is asked over its own passage and two others.
Prints Markdown: bytes a passage in the cache, answers that are others than with f32, and exact match. Needs Python alone.
"""
import argparse
import json
import random
import re
import string
import subprocess
import tempfile
from pathlib import Path


def normal(text):
    """As SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--refrag", default="build/refrag")
    args, run_options = parser.parse_known_args()
    lines = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines() if line.strip()]
    draw = random.Random(1)
    lines = draw.sample([line for line in lines if line["answers"]], min(args.limit, len(lines)))
    texts = sorted({line["text"] for line in lines})
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.jsonl"
        with open(batch, "w", encoding="utf-8") as out:
            for i, line in enumerate(lines):
                passages = [line["text"], *draw.sample(texts, 2)]
                draw.shuffle(passages)
                out.write(json.dumps({"id": i, "question": line["question"], "passages": passages}) + "\n")
        print("| kept as | bytes a passage | other answers than f32 | exact match | n |\n|---|---|---|---|---|")
        for form in ("f32", "bf16", "int8"):
            cache = Path(folder) / form
            command = [args.refrag, "run", "-m", args.model, "--batch", batch, "-n", "24", "--cache", cache, "--cache-type", form, *run_options]
            said = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout
            answers[form] = [json.loads(line).get("answer", "") for line in said.splitlines()]
            size = (cache / "chunk-embeddings.db").stat().st_size / len(texts)
            differ = sum(a != b for a, b in zip(answers[form], answers["f32"]))
            right = sum(normal(a) in {normal(gold) for gold in line["answers"]} for a, line in zip(answers[form], lines))
            print(f"| {form} | {size:.0f} | {differ} | {right / len(lines):.3f} | {len(lines)} |", flush=True)


if __name__ == "__main__":
    main()
