"""Makes tests/golden/int8.safetensors: matrices of each float type and what quantize.py makes of them, for
tests/test_int8.cpp, which holds the C++ rule to the same bits.

    python weights_tools/make_golden_int8.py

Tensors: NAME (F32, F16 or BF16), NAME.q (I8) and NAME.scale (F16). Needs numpy.
"""
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import quantize  # noqa: E402

SEED = 3
TARGET = pathlib.Path(__file__).parent.parent / "tests/golden/int8.safetensors"


def rows(rng):
    """[n, 70] float32: two whole groups and one of 6, of many sizes and some special kinds."""
    sizes = np.exp2(rng.uniform(-30, 20, (48, 1))).astype(np.float32)
    x = (rng.standard_normal((48, 70)) * sizes).astype(np.float32)
    x[0] = 0
    x[1, 3:] = 0
    x[2, 5] = 1000  # one large value among small ones
    x[3] = np.float32(1e-42)  # denormal; its scale is F16's smallest
    x[4] = np.float32(2.0**-24) * np.arange(-35, 35)  # scales that are denormal
    x[5] = np.arange(70)
    x[5, 0] = 127  # a scale of 1: whole numbers, and halves below, where ties go to the even number
    x[6] = np.arange(70) / 2 - 20
    x[6, [0, 32, 64]] = 127
    x[7] = -x[6]
    x[8] = np.tile(quantize.LARGEST * np.array([1, -1], np.float32), 35)
    x[9] = np.float32(65504)
    return x


def bf16(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def main():
    rng = np.random.default_rng(SEED)
    x = rows(rng)
    # Rounding to bf16 may pass the largest value that has a scale.
    stored = {
        "f32": ("F32", x),
        "bf16": ("BF16", bf16(np.clip(x, -8.3e6, 8.3e6))),
        "f16": ("F16", np.clip(x, -65504, 65504).astype(np.float16)),
    }
    shapes, tensors = [], []
    for name, (dtype, values) in stored.items():
        q, scales = quantize.quantize(quantize.widen(values.view(np.uint8).reshape(-1), dtype).reshape(x.shape))
        for suffix, kind, content in (("", dtype, values), (".scale", "F16", scales), (".q", "I8", q)):
            shapes.append((name + suffix, kind, list(content.shape), None))
            tensors.append((name + suffix, kind, list(content.shape), content))
    quantize.write(TARGET, {"made_by": "weights_tools/make_golden_int8.py"}, tensors, shapes)


if __name__ == "__main__":
    main()
