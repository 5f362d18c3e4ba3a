"""Makes tests/golden/gguf.safetensors: blocks of random bytes of every GGUF type, and what the `gguf` package makes
of them, for tests/test_gguf.cpp.

    python weights_tools/make_golden_gguf.py

Tensors: TYPE.blocks (U8 [n, block bytes]) and TYPE.values (F32 [n, block values]). Needs numpy, gguf, safetensors.
"""
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

SEED = 11
N_BLOCKS = 6
TARGET = pathlib.Path(__file__).parent.parent / "tests/golden/gguf.safetensors"
# Where a block's F16 numbers lie, in bytes.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2],
          "Q6_K": [208]}


def main():
    rng = np.random.default_rng(SEED)
    tensors = {}
    for name, scales in SCALES.items():
        kind = gguf.GGMLQuantizationType[name]
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (N_BLOCKS, block_bytes), dtype=np.uint8)
        for at in scales:  # any bits would be infinities now and then
            numbers = (rng.standard_normal(N_BLOCKS) * np.exp2(rng.uniform(-12, 4, N_BLOCKS))).astype(np.float16)
            numbers[0] = 2.0**-24 * 5  # a denormal one
            blocks[:, at:at + 2] = numbers.view(np.uint8).reshape(N_BLOCKS, 2)
        tensors[f"{name}.blocks"] = blocks
        tensors[f"{name}.values"] = gguf.quants.dequantize(blocks, kind).astype(np.float32)
    save_file(tensors, TARGET)
    print(TARGET, TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
