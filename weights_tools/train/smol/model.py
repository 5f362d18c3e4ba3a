"""The networks of refrag-smol: the lean decoder with its adapter, an encoder on its vocabulary, projector, policy.

The encoder's word embeddings are the decoder's times one matrix V [dim, d_enc], both frozen: V holds the principal directions of the decoder's, so git keeps V
alone. Its four special tokens (start, padding, end of a chunk) are the decoder's <|im_start|>, a reserved token that never occurs in text, <|im_end|>.
"""
import os
from pathlib import Path

import torch
from torch import nn

from weights_tools.gguf import Gguf, llama_config, llama_weights

from ..common import World, computes_in_bf16, read_config
from .decoder import LeanDecoder


def place(path):
    return Path(path).expanduser()


def open_gguf(cfg):
    return Gguf(place(os.environ.get("REFRAG_SMOL_GGUF", cfg["decoder"]["gguf"])))


class Smol(nn.Module):
    """cfg: the run's configuration; parts: which networks besides the decoder this stage has."""

    def __init__(self, cfg, parts=(), gguf=None):
        super().__init__()
        gguf = gguf or open_gguf(cfg)
        d, run = cfg["decoder"], cfg.get("run", {})
        self.cfg, config = cfg, llama_config(gguf)
        dtype = torch.bfloat16 if computes_in_bf16("cpu", run) else torch.float32
        self.decoder = LeanDecoder(config, llama_weights(gguf), d["rank"], d["alpha"] / max(1, d["rank"]), dtype)
        self.end = config["eos_token_id"]

    @property
    def device(self):
        return self.decoder.embed.device

    def parameters_changed(self):
        self.decoder.merge()


def begin(config, parts=()):
    """(configuration, world, model) of a stage's TOML."""
    cfg = read_config(config)
    run = cfg["run"]
    run["out"] = str(place(run["out"]))
    cfg["data"]["folder"] = str(place(cfg["data"]["folder"]))
    world = World(run.get("device"), run.get("threads"))
    torch.manual_seed(run["seed"])
    model = Smol(cfg, parts)
    if "init" in run:
        take_weights(model, place(run["init"]), run.get("fresh", []))
    run["precision"] = "fp32"  # the decoder has its dtype already
    return cfg, world, model


def take_weights(model, checkpoint, fresh=()):
    """What a stage's last.pt has of the model's networks; those of `fresh`, and those it lacks, stay as they are."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]
    state = {k: v for k, v in state.items() if k.split(".")[0] not in fresh}
    held = {k.split(".")[0] for k in state}
    own = model.state_dict()
    unknown = [k for k in state if k not in own and k.split(".")[0] in {n.split(".")[0] for n in own}]
    assert not unknown, f"{checkpoint}: expected the names of this model, found {unknown[0]}"
    model.load_state_dict({k: state[k] if k.split(".")[0] in held else v for k, v in own.items()})
    model.parameters_changed()
