"""Writes a checkpoint as a model directory (see the README): bf16 safetensors, configurations, tokenizer, refrag.json; and
reads one back. Every file is replaced in one step, so a reader never meets half a file.

    python -m weights_tools.train.export configs/nano/model.toml --checkpoint FILE --tokenizer FILE --out DIR
"""
import argparse
import json
import os
import shutil
import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .common import load_model
from .model import BOS, EOS, PAD, Refrag


def replace(path, write):
    """Calls write(temporary path), then puts that file into place."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def write_json(path, value):
    replace(path, lambda t: t.write_text(json.dumps(value, indent=2) + "\n"))


def decoder_config(d):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **d, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "rope_scaling": None, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }


def encoder_config(e):
    return {
        "architectures": ["RobertaModel"], "model_type": "roberta", **e, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "position_embedding_type": "absolute", "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }


def refrag_config(cfg):
    r, p = cfg["refrag"], cfg["policy"]
    return {
        "format": 1, "chunk_len": r["chunk_len"], "chunk_lens": r["chunk_lens"], "chunk_unit": "decoder_tokens",
        "encoder": {"vocabulary": "shared", "special_tokens": True, "pooling": "mean", "normalize": False},
        "projector": {"activation": "gelu"},
        "policy": {k: p[k] for k in ("n_layers", "n_heads", "dim", "hidden_dim", "norm_eps", "sees_question")},
        "expand_fraction": r["expand_fraction"],
        "template": cfg["template"],
        "segment_order": ["passages", "question"],
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
    "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
}


def save_bf16(module, path):
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in module.state_dict().items()}
    tensors.pop("lm_head.weight", None)  # tied to model.embed_tokens.weight
    replace(path, lambda t: save_file(tensors, t, metadata={"format": "pt"}))


def export(cfg, model, tokenizer, out):
    out = Path(out)
    for side in ("encoder", "decoder"):
        (out / side).mkdir(parents=True, exist_ok=True)
        replace(out / side / "tokenizer.json", lambda t: shutil.copyfile(tokenizer, t))
    write_json(out / "refrag.json", refrag_config(cfg))
    write_json(out / "decoder/config.json", decoder_config(cfg["decoder"]))
    write_json(out / "decoder/generation_config.json", {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "do_sample": False})
    write_json(out / "decoder/tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": cfg["decoder"]["max_position_embeddings"]})
    write_json(out / "encoder/config.json", encoder_config(cfg["encoder"]))
    save_bf16(model.decoder, out / "decoder/model.safetensors")
    save_bf16(model.encoder, out / "encoder/model.safetensors")
    save_bf16(model.projector, out / "projector.safetensors")
    save_bf16(model.policy, out / "policy.safetensors")


SHAPE_KEYS = {
    "decoder": ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                "max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings").split(),
    "encoder": ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
                "type_vocab_size layer_norm_eps").split(),
}


def load_directory(folder):
    """(model in fp32 with the stored, rounded weights, refrag.json) of a directory that `export` wrote."""
    folder = Path(folder)
    refrag = json.loads((folder / "refrag.json").read_text())
    cfg = {"policy": refrag["policy"]}
    for side, keys in SHAPE_KEYS.items():
        stored = json.loads((folder / side / "config.json").read_text())
        cfg[side] = {k: stored[k] for k in keys}
    model = Refrag(cfg)
    state = {}
    for part, name in (("decoder", "decoder/model"), ("encoder", "encoder/model"), ("projector", "projector"), ("policy", "policy")):
        state |= {f"{part}.{k}": v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}
    state["decoder.lm_head.weight"] = state["decoder.model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval(), refrag


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the model's TOML")
    parser.add_argument("--checkpoint", help="without one, random weights")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    cfg = tomllib.loads(Path(args.config).read_text())
    torch.manual_seed(0)
    export(cfg, load_model(cfg, args.checkpoint), args.tokenizer, args.out)


if __name__ == "__main__":
    main()
