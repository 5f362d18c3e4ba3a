"""Runs the stages of a configuration folder one after another, unattended, and exports the model after each.

Stages that are done are skipped, an interrupted one resumes from its last checkpoint. A stage whose configuration the folder lacks
is passed over; the last checkpoint of an earlier one is then what its successor's `init` names.

    python -m weights_tools.train.run_all weights_tools/train/configs/nano --out weights_tools/refrag-nano [--processes 2]
"""
import argparse
import subprocess
import sys
from pathlib import Path

from .common import read_config

# (module, configuration)
STAGES = [("pretrain", "pretrain"), ("reconstruct", "reconstruct"), ("cpt", "cpt"), ("sft", "sft"), ("grpo", "policy"), ("grpo", "policy-text")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--out", help="model directory; without one nothing is exported")
    parser.add_argument("--processes", type=int, default=1, help="processes that share a step's parts (torchrun)")
    parser.add_argument("--until", choices=[name for _, name in STAGES], help="the last stage to run")
    args = parser.parse_args()
    configs = Path(args.configs)
    start = [sys.executable] if args.processes == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.processes}"]
    for module, name in STAGES:
        config = configs / f"{name}.toml"
        if config.exists():
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
        if name == args.until:
            break


if __name__ == "__main__":
    main()
