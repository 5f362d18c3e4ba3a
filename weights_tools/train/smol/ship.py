"""Writes what the repository holds of refrag-smol from the reader's export (export.py): the decoder's adapter, and a refrag.json that says nothing of an
encoder. weights_tools/set_up_smol.py makes a model directory of it.

    python -m weights_tools.train.smol.ship EXPORT --out weights_tools/refrag-smol [--chunk-len 16 --expand-fraction 0.25]
"""
import argparse
import json
import shutil
from pathlib import Path

from weights_tools.gguf import write_json


def ship(export, out, chunk_len=None, expand_fraction=None):
    export, out = Path(export), Path(out)
    (out / "decoder").mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(export / "adapter" / name, out / "decoder" / name)
    config = json.loads((export / "model/refrag.json").read_text(encoding="utf-8"))
    if json.loads((export / "model/encoder/config.json").read_text(encoding="utf-8"))["num_hidden_layers"] > 1:
        raise SystemExit(f"{export}: expected a stage before the encoder's, found a trained encoder")
    for name in ("encoder", "projector", "policy"):
        del config[name]
    if chunk_len:
        config |= {"chunk_len": chunk_len, "chunk_lens": [chunk_len]}
    if expand_fraction is not None:
        config["expand_fraction"] = expand_fraction
    write_json(out / "refrag.json", config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", help="the folder that export.py wrote")
    parser.add_argument("--out", required=True)
    parser.add_argument("--chunk-len", type=int)
    parser.add_argument("--expand-fraction", type=float)
    args = parser.parse_args()
    ship(args.export, args.out, args.chunk_len, args.expand_fraction)


if __name__ == "__main__":
    main()
