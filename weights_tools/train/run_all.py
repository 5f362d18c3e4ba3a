"""Runs the stages of a configuration folder one after another, unattended, and exports the model after each.

Stages that are done are skipped, an interrupted one resumes from its last checkpoint. A stage whose configuration the folder lacks
is passed over; the last checkpoint of an earlier one is then what its successor's `init` names. With --first and --init a training
goes on from a stage's border on another machine, without the checkpoints of the stages before.

    python -m weights_tools.train.run_all weights_tools/train/configs/nano --out weights_tools/refrag-nano [--processes 2]
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from .common import read_config

# (module, configuration)
STAGES = [("pretrain", "pretrain"), ("reconstruct", "reconstruct"), ("cpt", "cpt"), ("sft", "sft"), ("grpo", "policy"), ("grpo", "policy-text")]


def starting_from(config, init):
    """A configuration file beside the stage's checkpoint: `config` with another `init`."""
    out = Path(read_config(config)["run"]["out"])
    out.mkdir(parents=True, exist_ok=True)
    variant = out / "started-from.toml"
    variant.write_text(f"base = {json.dumps(str(config.resolve()))}\n\n[run]\ninit = {json.dumps(init)}\n")
    return variant


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--out", help="model directory; without one nothing is exported")
    parser.add_argument("--processes", type=int, default=1, help="processes that share a step's parts (torchrun)")
    names = [name for _, name in STAGES]
    parser.add_argument("--first", choices=names, default=names[0], help="the first stage to run")
    parser.add_argument("--until", choices=names, default=names[-1], help="the last stage to run")
    parser.add_argument("--init", metavar="PATH", help="what the first stage (with --first policy also policy-text) starts from: a checkpoint, or a model directory (or the decoder's in there) that export.py wrote")
    args = parser.parse_args(argv)
    if names.index(args.first) > names.index(args.until):
        parser.error(f"--first: expected a stage not after {args.until} (--until), found {args.first}")
    if args.init and not Path(args.init).exists():
        parser.error(f"--init: expected a checkpoint or a model directory, found nothing at {args.init}")
    configs = Path(args.configs)
    if args.init and not (configs / f"{args.first}.toml").exists():
        parser.error(f"--init: expected {configs / args.first}.toml, which is to start from it; found none")
    # Both policies start from the fine-tuned model.
    initialised = {args.first, "policy-text"} if args.first == "policy" else {args.first}
    start = [sys.executable] if args.processes == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.processes}"]
    for module, name in STAGES[names.index(args.first) : names.index(args.until) + 1]:
        config = configs / f"{name}.toml"
        if config.exists():
            if args.init and name in initialised:
                config = starting_from(config, args.init)
            cfg = read_config(config)
            out = Path(cfg["run"]["out"])
            if not (out / "done.json").exists():
                print(f"== {name}", flush=True)
                done = subprocess.run([*start, "-m", f"weights_tools.train.{module}", str(config)])
                if done.returncode:
                    raise SystemExit(done.returncode)
            if args.out:
                what = ["--policy-only", "policy-text.safetensors"] if name == "policy-text" else []
                subprocess.run([sys.executable, "-m", "weights_tools.train.export", str(config), "--checkpoint", str(out / "last.pt"),
                                "--tokenizer", str(Path(cfg["data"]["folder"]) / "tokenizer.json"), "--out", args.out, *what], check=True)


if __name__ == "__main__":
    main()
