"""Runs refrag-smol's stages one after another, unattended, and exports after each. Stages that are done are skipped, an interrupted one resumes.

    python -m weights_tools.train.smol.run_all weights_tools/train/configs/smol --out ~/.cache/refrag-train/export [--last reader]
"""
import argparse
import signal
import subprocess
import sys
from pathlib import Path

from ..common import read_config
from .model import place

# In order: configurations and their modules here.
STAGES = {"reader": "reader", "warm": "warm", "reconstruct": "reconstruct", "cpt": "cpt", "cpt-lora": "cpt", "sft": "sft", "policy": "policy"}
NAMES = list(STAGES)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs")
    parser.add_argument("--out", required=True, help="a folder for each stage's export")
    parser.add_argument("--first", choices=NAMES, default=NAMES[0])
    parser.add_argument("--last", choices=NAMES, default=NAMES[-1])
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the stage saves and ends; its code then ends this
    for stage in NAMES[NAMES.index(args.first) : NAMES.index(args.last) + 1]:
        config = Path(args.configs) / f"{stage}.toml"
        out = place(read_config(config)["run"]["out"])
        if not (out / "done.json").exists():
            print(f"== {stage}", flush=True)
            code = subprocess.run([sys.executable, "-m", f"weights_tools.train.smol.{STAGES[stage]}", str(config)]).returncode
            if code:
                raise SystemExit(code)
        exported = place(args.out) / stage
        if not (exported / "model/refrag.json").exists():
            subprocess.run([sys.executable, "-m", "weights_tools.train.smol.export", str(config), "--out", str(exported)], check=True)


if __name__ == "__main__":
    main()
