"""Runs the stages of a configuration folder one after another, unattended, and exports the model after each.

Stages that are done are skipped, an interrupted one resumes from its last checkpoint.

    python -m weights_tools.train.run_all weights_tools/train/configs/nano --out weights_tools/refrag-nano
"""
import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

STAGES = [("pretrain", "pretrain"), ("reconstruct", "reconstruct"), ("cpt", "cpt"), ("sft", "sft"), ("grpo", "policy")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--out", required=True, help="model directory")
    args = parser.parse_args()
    configs = Path(args.configs)
    for module, name in STAGES:
        config = configs / f"{name}.toml"
        cfg = tomllib.loads(config.read_text())
        stage_out, tokenizer = Path(cfg["run"]["out"]), Path(cfg["data"]["folder"]) / "tokenizer.json"
        if not (stage_out / "done.json").exists():
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"weights_tools.train.{module}", str(config)], check=True)
        subprocess.run([sys.executable, "-m", "weights_tools.train.export", str(configs / "model.toml"), "--checkpoint",
                        str(stage_out / "last.pt"), "--tokenizer", str(tokenizer), "--out", args.out], check=True)


if __name__ == "__main__":
    main()
