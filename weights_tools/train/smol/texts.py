"""Text for the stages after the reader: windows to train on, and held-out ones to watch."""
import numpy as np

from ..batches import Segments, Text
from .model import place


def open_text(cfg):
    """Text (../batches.py) of [data] weights."""
    return Text(place(cfg["data"]["folder"]), cfg["data"]["weights"])


def held_out_windows(cfg, n, size):
    """n windows of `size` ids, spread evenly over the validation novels, which no stage trains on."""
    folder = place(cfg["data"]["folder"])
    ids = np.array(Segments(folder / "tokenizer.json")((folder / "validation/novels.txt").read_text(encoding="utf-8")))
    assert len(ids) >= size, f"{folder}/validation/novels.txt: expected {size} tokens, found {len(ids)}"
    return [ids[begin : begin + size] for begin in np.linspace(0, len(ids) - size, n).astype(int)]
