"""How every stage begins: its configuration, processes, networks, text and tokenizer, of whichever kind the configuration names."""
from pathlib import Path

import torch

from .batches import Qa, Segments, Text
from .common import World, load_model, read_config
from .tasks import Tasks


def begin(config):
    """(configuration, world, model) of a run's TOML. [decoder] with `path` means Hugging Face directories (pretrained.py)."""
    cfg = read_config(config)
    run = cfg["run"]
    world = World(run.get("device"), run.get("threads"))
    torch.manual_seed(run["seed"])
    if "path" in cfg["decoder"]:
        from .pretrained import load_pretrained

        model = load_pretrained(cfg, run.get("init"))
    else:
        model = load_model(cfg, run.get("init"), run.get("fresh", []))
    if run.get("compile"):
        model.fuse(dynamic=run.get("dynamic_shapes"))
    return cfg, world, model


def open_text(cfg, world):
    """Text with `window(rng, n)`: arrays that prepare.py made, or a stream of a dataset ([data] stream, stream.py)."""
    data = cfg["data"]
    if "stream" in data:
        from .stream import Stream

        return Stream(cfg, world)
    return Text(data["folder"], data["weights"])


def open_segments(cfg):
    decoder = cfg["decoder"].get("path")
    return Segments(Path(decoder or cfg["data"]["folder"]) / "tokenizer.json")


def open_questions(cfg, model, **options):
    """Question tasks in the model's template ([data] tasks). `options`: Tasks'."""
    data = cfg["data"]
    return Qa(open_segments(cfg), cfg["template"], model.bos, model.eos, Tasks(data["folder"], data["tasks"], **options))
