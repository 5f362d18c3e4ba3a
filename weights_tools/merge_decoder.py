#!/usr/bin/env python3
"""Writes a model's decoder as other engines read it: a Hugging Face directory in bf16, an adapter merged in, GGUF turned into safetensors.

    python -m weights_tools.merge_decoder MODEL OUT

MODEL: a model directory (its decoder/), a directory with a decoder, or a .gguf file. What `refrag --decoder-url` asks is then `vllm serve OUT`. Needs
torch and safetensors. GGUF: as gguf.py reads it (architecture llama; F32, F16, BF16, Q8_0, Q4_0, Q4_1; tokenizer smollm).
"""
import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from weights_tools.gguf import Gguf, llama_config, llama_weights, tokenizer_config, tokenizer_json, write_json
from weights_tools.shards import Entry, open_weights, write_sharded

KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")
SHARD_BYTES = 4 << 30


class Adapter:
    """A PEFT adapter of linear layers: the difference that it makes to a weight."""

    def __init__(self, folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
            if config.get(key):
                raise SystemExit(f"merge_decoder: {folder}/adapter_config.json: {key}: expected none, found {config[key]}")
        self.scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        self.tensors = {k: v.read() for k, v in open_weights(folder / "adapter_model.safetensors").items()}
        self.used = set()

    def merged(self, name, weight):
        at = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = f"{at}.lora_A.weight", f"{at}.lora_B.weight"
        if a not in self.tensors:
            return weight
        self.used |= {a, b}
        return weight.float() + self.scale * self.tensors[b].float() @ self.tensors[a].float()


def weights_of(source):
    """[(Hugging Face name, shape, function that gives the tensor)] of a GGUF file or a directory."""
    if source.suffix == ".gguf":
        gguf = Gguf(source)
        return [(name, weight.shape, lambda weight=weight: torch.from_numpy(np.ascontiguousarray(weight))) for name, weight in llama_weights(gguf)]
    return [(name, stored.shape, stored.read) for name, stored in open_weights(source).items()]


def write_files(source, folder, out):
    """Configuration and tokenizer."""
    if source.suffix == ".gguf":
        gguf = Gguf(source)
        config = llama_config(gguf) | {"torch_dtype": "bfloat16"}
        write_json(out / "config.json", config)
        write_json(out / "tokenizer.json", tokenizer_json(gguf))
        write_json(out / "tokenizer_config.json", tokenizer_config(gguf))
        write_json(out / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False})
    else:
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        write_json(out / "config.json", config | {"torch_dtype": "bfloat16"})
    # Files beside the weights go before what a GGUF file says.
    for name in KEPT:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    source = args.model / "decoder" if (args.model / "decoder").is_dir() else args.model
    folder = source.parent if source.suffix == ".gguf" else source
    if (source / "model.gguf").exists():
        source = source / "model.gguf"
    if not source.exists():
        raise SystemExit(f"merge_decoder: {source}: no such file or directory")
    if args.out.exists():
        raise SystemExit(f"merge_decoder: {args.out}: exists already")
    adapter = Adapter(folder) if (folder / "adapter_config.json").exists() else None
    new = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)

    def tensor(name, read):
        weight = read()
        return (adapter.merged(name, weight) if adapter else weight).to(torch.bfloat16)

    entries = [Entry(name, torch.bfloat16, tuple(shape), lambda name=name, read=read: tensor(name, read)) for name, shape, read in weights_of(source)]
    write_sharded(new, entries, SHARD_BYTES)
    if adapter and adapter.used != set(adapter.tensors):
        raise SystemExit(f"merge_decoder: {folder}: the adapter has tensors for no weight: {', '.join(sorted(set(adapter.tensors) - adapter.used)[:3])}")
    write_files(source, folder, new)
    os.rename(new, args.out)
    print(f"{args.out}: {len(entries)} tensors in bf16{', the adapter merged' if adapter else ''}", file=sys.stderr)


if __name__ == "__main__":
    main()
