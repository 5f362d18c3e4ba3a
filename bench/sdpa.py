#!/usr/bin/env python3
"""PyTorch's scaled_dot_product_attention in bf16 at the attention shapes of bench_cuda.cpp, as tables of the same form:
prefill in parts of 2048 rows after what went before, and decode steps. K and V are contiguous here and bf16, q too,
whereas bench_cuda reads a paged cache and fp32 activations.

    python3 bench/sdpa.py [--dim HEAD_DIM]

Each figure is the median of 20 timed batches of calls, recorded as a CUDA graph where PyTorch can, with the fastest of
the implementations that take the shape (named beside it). Prints SKIP and ends with status 0 where there is no PyTorch or
no GPU.
"""

import argparse
import statistics
import sys

PART = 2048
PARTS = 8
REPEATS = 20
BATCH_MS = 5.0
APART_BYTES = 512 << 20
HEADS = ((32, 32, 128), (32, 8, 128), (32, 32, 64), (32, 8, 64))

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(0)


def timed_ms(run, calls):
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / calls


def median_ms(call):
    """Milliseconds of one call(i), i counting the calls of a batch."""
    for i in range(3):
        call(i)
    one = timed_ms(lambda: [call(i) for i in range(8)], 8)
    calls = max(1, min(1000, round(BATCH_MS / one)))

    def plain():
        for i in range(calls):
            call(i)

    run = plain
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain()
        run = graph.replay
    except RuntimeError as error:
        print(f"sdpa.py: not recorded: {error}", file=sys.stderr)
    for _ in range(2):
        timed_ms(run, calls)
    return statistics.median(timed_ms(run, calls) for _ in range(REPEATS))


def fastest(call):
    """(ms, name) of the fastest implementation that takes these tensors."""
    best = None
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(SDPBackend, name, None)
        if backend is None:
            continue
        try:
            with sdpa_kernel(backend):
                ms = median_ms(call)
        except (RuntimeError, ValueError, TypeError) as error:
            torch.cuda.synchronize()
            print(f"sdpa.py: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if best is None or ms < best[0]:
            best = (ms, name.split("_", maxsplit=1)[0].lower())
    return best


def drawn(*shape):
    return torch.rand(shape, device="cuda", dtype=torch.bfloat16) * 2 - 1


def shown(heads, kv_heads, dim):
    return f"{heads} heads, {kv_heads} KV heads, dim {dim}"


def peaks():
    """TFLOP/s of a bf16 product, GB/s of reading."""
    x, w = drawn(8192, 8192), drawn(8192, 8192)
    tflops = 2.0 * 8192**3 / median_ms(lambda _: torch.matmul(x, w)) * 1e-9
    big = torch.rand(1 << 30, device="cuda")
    copied = torch.empty_like(big)
    gbs = 2.0 * big.nbytes / median_ms(lambda _: copied.copy_(big)) * 1e-6
    return tflops, gbs


def prefill(peak, shapes):
    print(f"\n| attention, prefill: {PART} new rows | after | ms | TFLOP/s | of bf16 | by |\n|---|---|---|---|---|---|")
    for heads, kv_heads, dim in shapes:
        gqa = heads != kv_heads

        def flops(start, n):
            return 4.0 * dim * heads * (n * start + n * (n + 1) / 2)

        def row(after, ms, count, by):
            tflops = count / ms * 1e-9
            print(f"| {shown(heads, kv_heads, dim)} | {after} | {ms:.3f} | {tflops:.1f} | {tflops / peak:.2f} | {by} |", flush=True)

        total = 0.0
        for part in range(PARTS):
            start = part * PART
            q, k, v = drawn(1, heads, PART, dim), drawn(1, kv_heads, start + PART, dim), drawn(1, kv_heads, start + PART, dim)
            # Rows see what came before them: the mask's corner is the lower right one.
            mask = {"is_causal": True} if start == 0 else {"attn_mask": causal_lower_right(PART, start + PART)}
            found = fastest(lambda _: scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **mask))
            if found is None:
                print(f"| {shown(heads, kv_heads, dim)} | {start} | - | - | - | none |")
                total = None
                break
            total += found[0]
            if part in (0, 1, PARTS - 1):
                row(start, found[0], flops(start, PART), found[1])
        if total is not None:
            row(f"sum of {PARTS} parts", total, flops(0, PARTS * PART), "the fastest of each")


def decode(read, shapes):
    print("\n| attention, decode | batch | context | us | KV GB/s | of copying | by |\n|---|---|---|---|---|---|---|")
    for heads, kv_heads, dim in shapes:
        for batch in (1, 8):
            for context in (1024, 4096, 16384):
                size = 2.0 * 2 * kv_heads * dim * context * batch
                copies = max(2, int(APART_BYTES / size) + 1)
                q = drawn(batch, heads, 1, dim)
                held = [(drawn(batch, kv_heads, context, dim), drawn(batch, kv_heads, context, dim)) for _ in range(copies)]
                found = fastest(
                    lambda i: scaled_dot_product_attention(
                        q, held[i % copies][0], held[i % copies][1], enable_gqa=heads != kv_heads
                    )
                )
                where = f"| {shown(heads, kv_heads, dim)} | {batch} | {context} "
                if found is None:
                    print(f"{where}| - | - | - | none |")
                    continue
                gbs = size / found[0] * 1e-6
                print(f"{where}| {found[0] * 1e3:.1f} | {gbs:.0f} | {gbs / read:.2f} | {found[1]} |", flush=True)
                del held


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, choices=(64, 128), help="shapes of this head_dim alone")
    wanted = parser.parse_args().dim
    shapes = [shape for shape in HEADS if wanted in (None, shape[2])]
    if not torch.cuda.is_available():
        print("SKIP: PyTorch finds no GPU")
        return 0
    torch.manual_seed(0)
    tflops, gbs = peaks()
    torch.cuda.empty_cache()
    print(f"GPU: {torch.cuda.get_device_name()}\nPyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"peaks: bf16 {tflops:.1f} TFLOP/s, memory copied {gbs:.0f} GB/s (read and written)\nmedians of {REPEATS} batches of calls")
    prefill(tflops, shapes)
    decode(gbs, shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
