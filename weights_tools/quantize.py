#!/usr/bin/env python3
"""Writes a model directory with the layers' matrices in 8 bits, as `refrag --weights int8` makes them while
loading: the same bits, half the file (of BF16) and no quantising at each start.

    python weights_tools/quantize.py MODEL_DIR OUT_DIR

OUT_DIR must not exist. It gets every file of MODEL_DIR; only the safetensors below encoder/ and decoder/ differ.
In them a matrix NAME [out, in] of F32, F16 or BF16 becomes two tensors:

    NAME         I8   [out, in]               q
    NAME_scale   F16  [out, ceil(in / 32)]    s, one for 32 neighbours of a row; the last group may be shorter

The rule (src/base/int8.h has the same): s is the smallest F16 number with 127 s >= max |w| of the group,
q = w / s as an F32 quotient, rounded to the nearest integer, ties to even. Group of zeros: s = 0, q = 0.

Quantised are the matrices of every layer of both networks, the decoder's head (with tied embeddings the table
that is the head as well) and the encoder's pooler where refrag.json asks for it. Tables that are only looked
up, norms, biases, the projector and the policy stay as they are. A NaN, an infinity, a weight beyond 127 times
F16's largest number, and a matrix that is I8 already are refused.

Needs numpy.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

GROUP = 32
BLOCK_VALUES = 1 << 24  # of a matrix, quantised at a time
LARGEST = np.float32(127 * 65504)
FLOATS = ("F32", "F16", "BF16")

DECODER = re.compile(r"(model\.)?(layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|%s)\.weight")
ENCODER = re.compile(
    r"(roberta\.)?(encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|"
    r"intermediate\.dense|output\.dense)|%s)\.weight"
)


class Refused(Exception):
    pass


def widen(raw, dtype):
    """The values of little-endian bytes as float32."""
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def scales_for(largest):
    """The smallest float16 s with 127 s >= largest, element by element; largest float32, at most LARGEST."""
    with np.errstate(over="ignore"):
        bits = (largest / np.float32(127)).astype(np.float16).view(np.uint16)
    bits = np.minimum(bits, np.uint16(0x7BFF))  # rounded to infinity

    def reaches(b):
        return b.view(np.float16).astype(np.float32) * np.float32(127) >= largest

    bits = np.where(reaches(bits), bits, bits + np.uint16(1))
    lower = np.where(bits > 0, bits - np.uint16(1), bits).astype(np.uint16)
    return np.where(reaches(lower), lower, bits).astype(np.uint16).view(np.float16)


def quantize(weights):
    """weights float32 [out, in] -> q int8 [out, in], scales float16 [out, ceil(in / 32)]."""
    out_dim, in_dim = weights.shape
    groups = -(-in_dim // GROUP)
    padded = np.zeros((out_dim, groups * GROUP), np.float32)
    padded[:, :in_dim] = weights
    grouped = padded.reshape(out_dim, groups, GROUP)
    scales = scales_for(np.abs(grouped).max(axis=2, initial=0))
    divisor = np.where(scales > 0, scales.astype(np.float32), np.float32(1))
    q = np.rint(grouped / divisor[:, :, None]).astype(np.int8)
    return np.ascontiguousarray(q.reshape(out_dim, -1)[:, :in_dim]), scales


def check(values, where, first_row):
    for bad, expected in (
        (~np.isfinite(values), "finite values"),
        (np.abs(values) > LARGEST, f"values of at most {LARGEST:.0f} in size"),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            found = values[row, column]
            raise Refused(f"{where}: expected {expected}, found {found} at element [{first_row + row}, {column}]")


def read_header(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def quantize_tensor(path, begin, name, entry):
    """The I8 and F16 tensors of a stored matrix; floats of a block of rows are in memory at a time."""
    out_dim, in_dim = entry["shape"]
    q = np.empty((out_dim, in_dim), np.int8)
    scales = np.empty((out_dim, -(-in_dim // GROUP)), np.float16)
    first, end = entry["data_offsets"]
    row_bytes = (end - first) // max(out_dim, 1)
    block = max(1, BLOCK_VALUES // max(in_dim, 1))
    for row in range(0, out_dim, block):
        rows = min(block, out_dim - row)
        raw = np.fromfile(path, np.uint8, rows * row_bytes, offset=begin + first + row * row_bytes)
        values = widen(raw, entry["dtype"]).reshape(rows, in_dim)
        check(values, f'{path}: tensor "{name}"', row)
        q[row : row + rows], scales[row : row + rows] = quantize(values)
    return q, scales


def pieces(path, header, begin, names, quantised):
    """For each tensor to write: its name, dtype, shape and bytes. One tensor is in memory at a time."""
    for name in names:
        entry = header[name]
        if name in quantised:
            q, scales = quantize_tensor(path, begin, name, entry)
            yield name, "I8", list(q.shape), q
            yield name + "_scale", "F16", list(scales.shape), scales
        else:
            first, end = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], np.fromfile(path, np.uint8, end - first, offset=begin + first)


def write(path, metadata, tensors, shapes):
    """Writes tensors, whose names, dtypes and shapes are known beforehand, as they come."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
    header, offset = {"__metadata__": metadata}, 0
    for name, dtype, shape, n_bytes in shapes:
        if n_bytes is None:
            n_bytes = sizes[dtype] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, values in tensors:
            assert header[name]["dtype"] == dtype and header[name]["shape"] == list(shape)
            values.tofile(file)


def convert(source, target, pattern):
    """One safetensors file; returns the names of the tensors that were quantised."""
    header, begin = read_header(source)
    metadata = header.pop("__metadata__", {})
    quantised = [name for name in header if pattern.fullmatch(name)]
    for name in quantised:
        entry = header[name]
        if entry["dtype"] not in FLOATS or len(entry["shape"]) != 2:
            raise Refused(
                f'{source}: tensor "{name}": expected a matrix of F32, F16 or BF16, found {entry["dtype"]} '
                f'{entry["shape"]}'
            )
        if name + "_scale" in header:
            raise Refused(f'{source}: tensor "{name}_scale" is there already')
    # In the file's order of places; I8 values fall on no alignment that a reader of ours would need.
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    shapes = []
    for name in names:
        entry = header[name]
        if name in quantised:
            out_dim, in_dim = entry["shape"]
            shapes.append((name, "I8", [out_dim, in_dim], None))
            shapes.append((name + "_scale", "F16", [out_dim, -(-in_dim // GROUP)], None))
        else:
            first, end = entry["data_offsets"]
            shapes.append((name, entry["dtype"], entry["shape"], end - first))
    write(target, metadata, pieces(source, header, begin, names, set(quantised)), shapes)
    return quantised


def convert_network(directory, pattern):
    """All safetensors of a network's directory, in place; its index, where there is one, is completed."""
    quantised = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = path.with_suffix(".part")
        for name in convert(path, part, pattern):
            quantised[name] = path.name
        part.replace(path)
    index_path = directory / "model.safetensors.index.json"
    if index_path.is_file():
        index = json.loads(index_path.read_text())
        for name, file in quantised.items():
            index["weight_map"][name + "_scale"] = file
        total = sum(path.stat().st_size - read_header(path)[1] for path in directory.glob("*.safetensors"))
        index.setdefault("metadata", {})["total_size"] = total
        index_path.write_text(json.dumps(index, indent=2) + "\n")
    if not quantised:
        raise Refused(f"{directory}: found no matrix to quantise")
    return quantised


def convert_model(source, target):
    if target.exists():
        raise Refused(f"{target}: expected a new directory, found one that exists")
    config = json.loads((source / "decoder" / "config.json").read_text())
    # A tied table is the head; lm_head.weight, if written out as well, is not read.
    head = "embed_tokens" if config.get("tie_word_embeddings", False) else "lm_head"
    pooled = json.loads((source / "refrag.json").read_text())["encoder"]["pooling"] == "pooler"
    shutil.copytree(source, target)
    try:
        before = sum(path.stat().st_size for path in target.glob("*/*.safetensors"))
        counts = [
            len(convert_network(target / "decoder", re.compile(DECODER.pattern % head))),
            len(convert_network(target / "encoder", re.compile(ENCODER.pattern % ("pooler.dense" if pooled else "(?!)")))),
        ]
        after = sum(path.stat().st_size for path in target.glob("*/*.safetensors"))
    except BaseException:
        shutil.rmtree(target)  # a half-converted model must not be mistaken for one
        raise
    print(f"{target}: {counts[0]} matrices of the decoder and {counts[1]} of the encoder; {before} -> {after} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    options = parser.parse_args()
    try:
        convert_model(options.model, options.out)
    except (Refused, OSError, KeyError, ValueError) as error:
        sys.exit(f"quantize.py: {error}")


if __name__ == "__main__":
    main()
