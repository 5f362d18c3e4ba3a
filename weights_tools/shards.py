"""Writes safetensors files of limited size and reads parts of them, one tensor in memory at a time: a model of any size passes
through a small machine.

A file is an 8-byte little-endian length, that many bytes of JSON ({name: {dtype, shape, data_offsets}}, padded with spaces to a
multiple of 8), then the tensors' bytes without gaps. `safetensors.save_file` needs all tensors of a file at once; this does not.
"""
import json
import os
import struct
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32",
          torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
METADATA = {"format": "pt"}


class Entry(NamedTuple):
    """A tensor to be written. get() makes it when its turn comes; its dtype and shape are known before."""

    name: str
    dtype: torch.dtype
    shape: tuple
    get: Callable

    @property
    def n_bytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entries_of(tensors, dtype=None):
    """Entries of {name: tensor}, converted to dtype if one is given."""
    return [Entry(name, dtype or t.dtype, tuple(t.shape), lambda t=t: t.detach().to(dtype or t.dtype)) for name, t in tensors.items()]


def header(entries):
    """The bytes before the tensors."""
    table, begin = {"__metadata__": METADATA}, 0
    for e in entries:
        table[e.name] = {"dtype": DTYPES[e.dtype], "shape": list(e.shape), "data_offsets": [begin, begin + e.n_bytes]}
        begin += e.n_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan(entries, max_bytes):
    """Entries cut in order into files of at most max_bytes, headers included. ValueError names a tensor that fits in none."""
    shards = []
    for e in entries:
        if shards and len(header(shards[-1] + [e])) + sum(x.n_bytes for x in shards[-1]) + e.n_bytes <= max_bytes:
            shards[-1].append(e)
        elif len(header([e])) + e.n_bytes <= max_bytes:
            shards.append([e])
        else:
            raise ValueError(f"{e.name}: needs a file of {len(header([e])) + e.n_bytes} bytes, expected at most {max_bytes} (the shard size)")
    return shards


def write_file(path, entries):
    """One safetensors file. Where path is None the tensors are made and dropped: what gathers them needs every process."""
    file = open(path, "wb") if path else None
    try:
        if file:
            file.write(header(entries))
        for e in entries:
            tensor = e.get()
            if not file:
                continue
            if tensor.dtype != e.dtype or tuple(tensor.shape) != tuple(e.shape):
                raise ValueError(f"{e.name}: expected {e.dtype} {list(e.shape)}, found {tensor.dtype} {list(tensor.shape)}")
            # Through memory, in pieces: numpy knows no bfloat16.
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            for begin in range(0, len(flat), 1 << 26):
                file.write(flat[begin : begin + (1 << 26)].numpy())
        if file:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if file:
            file.close()


def write_sharded(folder, entries, max_bytes, stem="model"):
    """STEM.safetensors in folder, or STEM-0000i-of-0000n.safetensors and STEM.safetensors.index.json where that is more than
    max_bytes. The folder should be one that nobody reads yet. folder None: see write_file. Returns the files' names."""
    shards = plan(entries, max_bytes)
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        write_file(os.path.join(folder, name) if folder else None, shard)
    if len(shards) > 1 and folder:
        index = {"metadata": {"total_size": sum(e.n_bytes for e in entries)}, "weight_map": {e.name: n for n, s in zip(names, shards) for e in s}}
        names.append(f"{stem}.safetensors.index.json")
        with open(os.path.join(folder, names[-1]), "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=1) + "\n")
    return names


class Stored(NamedTuple):
    """A tensor that lies in a file. read() gives it whole, read(a, b) its rows a to b - 1."""

    dtype: torch.dtype
    shape: tuple
    read: Callable


def stored_safetensors(path):
    file = safe_open(path, "pt")
    names = {v: k for k, v in DTYPES.items()}
    out = {}
    for name in file.keys():
        piece = file.get_slice(name)
        if piece.get_dtype() not in names:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(DTYPES.values())}, found {piece.get_dtype()}")
        read = lambda a=None, b=None, name=name, piece=piece: file.get_tensor(name) if a is None else piece[a:b]
        out[name] = Stored(names[piece.get_dtype()], tuple(piece.get_shape()), read)
    return out


def open_weights(path):
    """{name: Stored} of a safetensors file, of a directory's model.safetensors or its shards, or of a stage's last.pt."""
    path = Path(path)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        if not all((path / name).is_file() for name in files):
            raise FileNotFoundError(f"{path}: expected model.safetensors, or model.safetensors.index.json and its files "
                                    "(save_pretrained of transformers writes them)")
        return {k: v for name in files for k, v in stored_safetensors(path / name).items()}
    if path.suffix == ".safetensors":
        return stored_safetensors(path)
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["model"]
    return {k: Stored(t.dtype, tuple(t.shape), lambda a=None, b=None, t=t: t if a is None else t[a:b]) for k, t in state.items()}
