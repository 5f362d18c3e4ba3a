#!/usr/bin/env python3
"""Writes a GGUF file of a LLaMA with random BF16 weights, for timing llama.cpp and its kin on the shapes that
`refrag bench` makes in memory. Needs the packages numpy and gguf.

    python3 bench/make_gguf.py llama-160m 160m-bf16.gguf        then e.g. llama-quantize 160m-bf16.gguf 160m-q8_0.gguf Q8_0
"""
import argparse

import gguf
import numpy as np

# layers, width, hidden width, heads, KV heads: those of src/refrag/random_model.cpp
SHAPES = {
    "llama-160m": (12, 768, 2048, 12, 12),
    "tinyllama-1.1b": (22, 2048, 5632, 32, 4),
    "llama-2-7b": (32, 4096, 11008, 32, 32),
}
VOCAB = 32000
CONTEXT = 32768


def add_vocabulary(writer):
    kind = gguf.TokenType
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % i for i in range(256)]
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256
    tokens += [b"word%d" % i for i in range(len(tokens), VOCAB)]
    kinds += [kind.NORMAL] * (VOCAB - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out")
    args = parser.parse_args()
    layers, dim, hidden, heads, kv_heads = SHAPES[args.shape]
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name(f"{args.shape}, random weights")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_vocabulary(writer)

    def matrix(name, rows, columns):
        values = (random.random((rows, columns), dtype=np.float32) - 0.5) * 0.08
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(
            f"{name}.weight", halves.view(np.uint8).reshape(rows, 2 * columns), raw_dtype=gguf.GGMLQuantizationType.BF16
        )

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))

    matrix("token_embd", VOCAB, dim)
    norm("output_norm")
    matrix("output", VOCAB, dim)
    for layer in range(layers):
        at = f"blk.{layer}"
        norm(f"{at}.attn_norm")
        norm(f"{at}.ffn_norm")
        matrix(f"{at}.attn_q", dim, dim)
        matrix(f"{at}.attn_k", dim // heads * kv_heads, dim)
        matrix(f"{at}.attn_v", dim // heads * kv_heads, dim)
        matrix(f"{at}.attn_output", dim, dim)
        matrix(f"{at}.ffn_gate", hidden, dim)
        matrix(f"{at}.ffn_up", hidden, dim)
        matrix(f"{at}.ffn_down", dim, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
