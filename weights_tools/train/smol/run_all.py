"""Runs refrag-smol's stages one after another, unattended. Stages that are done are skipped, an interrupted one resumes.

    python -m weights_tools.train.smol.run_all weights_tools/train/configs/smol --out ~/.cache/refrag-train/export [--last reader] [--refrag build/refrag]

Each stage is exported. Where the runtime is built it measures the export, on SQuAD's development questions and an unseen textbook: qa.json and
perplexity.json beside it. A stage whose configuration has [gate] exact_match ends the run if its answers, with the passage that answers as tokens, are
worse than that.
"""
import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from ..common import read_config
from .model import place

# In order: configurations and their modules here.
STAGES = {"reader": "reader", "warm": "warm", "reconstruct": "reconstruct", "cpt": "cpt", "cpt-lora": "cpt", "sft": "sft", "policy": "policy"}
NAMES = list(STAGES)


QUESTIONS, SPANS = 200, 20


def measure(refrag, cfg, stage, exported):
    """Writes qa.json and, once there is an encoder, perplexity.json beside an exported model; those that are there stay. Returns the exact match at full
    context."""
    test, k = place(cfg["data"]["folder"]) / "test", ",".join(map(str, cfg["refrag"]["chunk_lens"]))
    compresses = stage not in ("reader", "warm")
    chooses = "model,bm25" if stage == "policy" else "bm25"
    mixed = ["--modes", "none,full,refrag", "-k", k, "-p", "0,0.1,0.25", "--policy", chooses] if compresses else ["--modes", "full"]
    commands = {"qa": ["qa", "--data", test / "squad-dev-1.1.jsonl", "--limit", QUESTIONS, "-n", 24, *mixed]}
    if compresses:
        commands["perplexity"] = ["perplexity", "--text", test / "textbooks.txt", "--context", "256,1024", "--limit", SPANS, "-k", k]
    for name, command in commands.items():
        path = exported / f"{name}.json"
        if not path.exists():
            command = [refrag, "eval", *map(str, command), "-m", str(exported / "model"), "-o", "json"]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            path.write_text(run.stdout, encoding="utf-8")
    return next(row["exact_match"] for row in json.loads((exported / "qa.json").read_text(encoding="utf-8")) if row["mode"] == "full")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--out", required=True, help="a folder for each stage's export")
    parser.add_argument("--first", choices=NAMES, default=NAMES[0])
    parser.add_argument("--last", choices=NAMES, default=NAMES[-1])
    parser.add_argument("--refrag", default="build/refrag", help="the runtime, to measure exports with, if it is there")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the stage saves and ends; its code then ends this
    for stage in NAMES[NAMES.index(args.first) : NAMES.index(args.last) + 1]:
        config = Path(args.configs) / f"{stage}.toml"
        cfg = read_config(config)
        out, wanted = place(cfg["run"]["out"]), cfg.get("gate", {}).get("exact_match")
        if not (out / "done.json").exists():
            print(f"== {stage}", flush=True)
            code = subprocess.run([sys.executable, "-m", f"weights_tools.train.smol.{STAGES[stage]}", str(config)]).returncode
            if code:
                raise SystemExit(code)
        exported = place(args.out) / stage
        if not (exported / "model/refrag.json").exists():
            subprocess.run([sys.executable, "-m", "weights_tools.train.smol.export", str(config), "--out", str(exported)], check=True)
        if not Path(args.refrag).is_file():
            print(f"{args.refrag} is not there: {stage} is not measured", flush=True)
            if wanted:
                raise SystemExit(f"{stage}: expected an exact match of {wanted} before the next stage, found no way to measure it")
            continue
        found = measure(args.refrag, cfg, stage, exported)
        print(f"{stage}: exact match {found:.3f} at full context, {QUESTIONS} questions", flush=True)
        if wanted and found < wanted:
            raise SystemExit(f"{stage}: expected an exact match of {wanted} before the next stage, found {found:.3f}: raise max_tokens, remove {out}/done.json "
                             f"and {exported}, and resume")


if __name__ == "__main__":
    main()
