"""Reads a GGUF file (versions 2 and 3): its metadata, its tensors in fp32, and what they say as Hugging Face names, configuration and
tokenizer.json. The trainer and merge_decoder use it; the runtime has a reader of its own.

A file is: "GGUF", version, counts of tensors and keys; the keys with their values; a description of each tensor; the tensors' bytes, each
at a multiple of `general.alignment` (32 where that key is absent). Of the types of tensors, those below are read.
"""
import json
import mmap
import struct
from pathlib import Path

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# type: (name, elements of a block, bytes of a block)
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type


def halves(raw, at):
    """The fp16 number at byte `at` of each block: raw [n_blocks, bytes] -> fp32 [n_blocks, 1]"""
    return raw[:, at : at + 2].copy().view("<f2").astype(np.float32)


def nibbles(raw):
    """[n, 16] bytes -> [n, 32] numbers 0 .. 15: the low halves of all bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def dequantise(kind, raw, size):
    """Bytes of a tensor of `size` elements -> fp32 [size]."""
    name, n, n_bytes = TYPES[kind]
    if name == "F32":
        return raw.view("<f4").astype(np.float32)
    if name == "F16":
        return raw.view("<f2").astype(np.float32)
    if name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, n_bytes)
    if name == "Q8_0":  # scale, 32 signed bytes
        out = blocks[:, 2:].view(np.int8).astype(np.float32) * halves(blocks, 0)
    elif name == "Q4_0":  # scale, 32 halves of bytes; 8 stands for zero
        out = (nibbles(blocks[:, 2:]) - 8) * halves(blocks, 0)
    else:  # Q4_1: scale, minimum, 32 halves of bytes
        out = nibbles(blocks[:, 4:]) * halves(blocks, 0) + halves(blocks, 2)
    return out.reshape(size)


class Gguf:
    """metadata {key: value}; tensors {name: (shape as PyTorch writes it, type, first byte)}; `read(name)` gives fp32."""

    def __init__(self, path):
        self.path = Path(path)
        with open(path, "rb") as f:
            self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 0
        magic, version, n_tensors, n_keys = self.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: expected GGUF version 2 or 3, found {magic!r} version {version}")
        self.metadata = {}
        for _ in range(n_keys):
            key = self.string()
            self.metadata[key] = self.value(self.take("<I")[0])
        described = []
        for _ in range(n_tensors):
            name, (n_dims,) = self.string(), self.take("<I")
            shape = self.take(f"<{n_dims}Q")[::-1]  # the file names the fastest dimension first
            described.append((name, shape, *self.take("<IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        self.tensors = {name: (shape, kind, begin + offset) for name, shape, kind, offset in described}

    def take(self, form):
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self):
        (size,) = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, n = self.take("<IQ")
            return list(self.take(f"<{n}{SCALARS[inner]}")) if inner in SCALARS else [self.value(inner) for _ in range(n)]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: expected a known type of value, found {kind}")
        return self.take(f"<{SCALARS[kind]}")[0]

    def read(self, name):
        shape, kind, begin = self.tensors[name]
        if kind not in TYPES:
            raise ValueError(f"{self.path}: {name}: expected one of {', '.join(t[0] for t in TYPES.values())}, found type {kind}")
        size = int(np.prod(shape))
        _, n, n_bytes = TYPES[kind]
        raw = np.frombuffer(self.data, np.uint8, size // n * n_bytes, begin)
        return dequantise(kind, raw, size).reshape(shape)


def unpermuted(weight, n_heads):
    """Rows of a q or k projection as Hugging Face orders them. Files of the architecture `llama` hold the two halves of a head's rotation
    interleaved: row 2i belongs to pair i's first half, row 2i + 1 to its second."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}


def llama_config(gguf):
    """config.json of a file of the architecture `llama`."""
    m = gguf.metadata
    if m["general.architecture"] != "llama":
        raise ValueError(f"{gguf.path}: expected the architecture llama, found {m['general.architecture']}")
    dim, heads = m["llama.embedding_length"], m["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": gguf.tensors["token_embd.weight"][0][0], "hidden_size": dim,
        "intermediate_size": m["llama.feed_forward_length"], "num_hidden_layers": m["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": m.get("llama.attention.head_count_kv", heads), "head_dim": m.get("llama.attention.key_length", dim // heads),
        "max_position_embeddings": m["llama.context_length"], "rms_norm_eps": round(m["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": m.get("llama.rope.freq_base", 10000.0), "tie_word_embeddings": "output.weight" not in gguf.tensors, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_cache": True,
        "bos_token_id": m["tokenizer.ggml.bos_token_id"], "eos_token_id": m["tokenizer.ggml.eos_token_id"],
        "pad_token_id": m.get("tokenizer.ggml.padding_token_id"),
    }


def llama_weights(gguf):
    """{Hugging Face name: fp32 array}, one tensor at a time."""
    config = llama_config(gguf)
    for name in gguf.tensors:
        weight = gguf.read(name)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                weight = unpermuted(weight, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
            yield f"model.layers.{layer}.{LAYER[part]}.weight", weight
        else:
            yield OUTER[name], weight


def tokenizer_json(gguf):
    """tokenizer.json of a `gpt2` vocabulary with the pre-tokenizer `smollm`: every digit alone, then byte-level words."""
    m = gguf.metadata
    model, pre = m["tokenizer.ggml.model"], m.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise ValueError(f"{gguf.path}: expected the tokenizer gpt2 with smollm, found {model} with {pre}")
    tokens = m["tokenizer.ggml.tokens"]
    types = m.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": types[i] == CONTROL}
             for i in range(len(tokens)) if types[i] in (CONTROL, USER_DEFINED)]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]},
        "post_processor": None, "decoder": words,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": [merge.split(" ", 1) for merge in m["tokenizer.ggml.merges"]]},
    }


def tokenizer_config(gguf):
    """tokenizer_config.json"""
    m = gguf.metadata
    tokens = m["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(m.get("tokenizer.ggml.add_bos_token", False)), "add_eos_token": False,
              "bos_token": tokens[m["tokenizer.ggml.bos_token_id"]], "eos_token": tokens[m["tokenizer.ggml.eos_token_id"]],
              "clean_up_tokenization_spaces": False, "model_max_length": m["llama.context_length"]}
    if "tokenizer.ggml.padding_token_id" in m:
        config["pad_token"] = tokens[m["tokenizer.ggml.padding_token_id"]]
    if "tokenizer.chat_template" in m:
        config["chat_template"] = m["tokenizer.chat_template"]
    return config


def write_json(path, value):
    Path(path).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
