"""Writes a checkpoint as a model directory (see the README): bf16 safetensors in shards, configurations, tokenizers, refrag.json; and
reads one back. The directory is written beside its place and put there by one exchange, so a reader never meets half of one; files
in it that are not the exporter's (README.md, licences) are taken along.

    python -m weights_tools.train.export configs/nano/model.toml --checkpoint FILE --tokenizer FILE --out DIR
    python -m weights_tools.train.export configs/llama-2-7b/model.toml --checkpoint build/train/llama-2-7b/4-policy/weights --out DIR

A configuration with [decoder] path keeps the layout and the tokenizer files of the Hugging Face directories named there. Tensors
pass one by one, so the model is never in memory.
"""
import argparse
import ctypes
import json
import os
import re
import shutil
from pathlib import Path

import torch

from weights_tools.shards import Entry, Stored, open_weights, write_file, write_sharded

from .common import load_model, read_config
from .model import BOS, EOS, PAD, Refrag

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL_SHARD, LARGE_SHARD = 15_000_000, 5_000_000_000  # bytes; of models made from a shape, and of pretrained ones
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "generation_config.json")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exchange(new, place):
    """Puts directory `new` at `place`; what was there is removed. Where the system can exchange two names there is no moment without
    either, elsewhere a short one, in which the former directory is PLACE.old."""
    if not place.exists():
        os.rename(new, place)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(-100, os.fsencode(new), -100, os.fsencode(place), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
        shutil.rmtree(new)
        return
    old = place.with_name(place.name + ".old")
    os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old)


def decoder_config(d):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **d, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "rope_scaling": None, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS,
    }


def encoder_config(e):
    return {
        "architectures": ["RobertaModel"], "model_type": "roberta", **e, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "position_embedding_type": "absolute", "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS,
    }


def refrag_config(cfg):
    r, p, e = cfg["refrag"], cfg["policy"], cfg["encoder"]
    own = "path" in e and e.get("vocabulary", "own") == "own"
    return {
        "format": 1, "chunk_len": r["chunk_len"], "chunk_lens": r["chunk_lens"], "chunk_unit": "decoder_tokens",
        "encoder": {"vocabulary": "own" if own else "shared", "special_tokens": e.get("special_tokens", True), "pooling": e.get("pooling", "mean"),
                    "normalize": e.get("normalize", False)},
        "projector": {"activation": "gelu"},
        "policy": {k: p[k] for k in ("n_layers", "n_heads", "dim", "hidden_dim", "norm_eps", "sees_question")},
        "expand_fraction": r["expand_fraction"],
        "template": cfg["template"],
        "segment_order": r.get("segment_order", ["passages", "question"]),
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
    "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
}


def part_entries(weights, part, dtype, left_out=()):
    """Entries of one network from {our name: Stored}, its own names, converted."""
    names = [n for n in weights if n.startswith(f"{part}.") and n not in left_out]
    return [Entry(n.removeprefix(f"{part}."), dtype, weights[n].shape, lambda w=weights[n]: w.read().to(dtype)) for n in names]


def copy_side(source, target, dtype):
    """config.json and the tokenizer's files of a Hugging Face directory."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_weights(cfg, weights, tokenizer, out, max_shard_bytes=None, max_total_bytes=None, dtype=torch.bfloat16):
    """Writes the model directory `out` of {our name: Stored} (shards.open_weights). tokenizer: the shared tokenizer.json; None where both
    sides have directories of their own. ValueError if a tensor does not fit into a shard, or the whole is larger than max_total_bytes."""
    out = Path(out)
    d, e = cfg["decoder"], cfg["encoder"]
    pretrained = "path" in d
    max_shard_bytes = max_shard_bytes or (LARGE_SHARD if pretrained else SMALL_SHARD)
    new = out.with_name(out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    for side in ("encoder", "decoder"):
        (new / side).mkdir(parents=True)
    try:
        write_json(new / "refrag.json", refrag_config(cfg))
        if pretrained:
            from .pretrained import directory_weights

            # What a stage did not hold (a part of the run alone) is as it was.
            weights = directory_weights(d["path"], "decoder") | directory_weights(e["path"], "encoder") | weights
            copy_side(Path(d["path"]), new / "decoder", dtype)
            copy_side(Path(e["path"]), new / "encoder", dtype)
            tied = json.loads((Path(d["path"]) / "config.json").read_text()).get("tie_word_embeddings", False)
        else:
            for side in ("encoder", "decoder"):
                shutil.copyfile(tokenizer, new / side / "tokenizer.json")
            write_json(new / "decoder/config.json", decoder_config(d) | {"torch_dtype": str(dtype).removeprefix("torch.")})
            write_json(new / "decoder/generation_config.json", {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "do_sample": False})
            write_json(new / "decoder/tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": d["max_position_embeddings"]})
            write_json(new / "encoder/config.json", encoder_config(e) | {"torch_dtype": str(dtype).removeprefix("torch.")})
            tied = d.get("tie_word_embeddings", False)
        left_out = {"decoder.lm_head.weight"} if tied else set()
        if not (pretrained and e.get("pooling") == "pooler"):
            left_out |= {n for n in weights if n.startswith(("encoder.pooler.", "encoder.lm_head."))}
        left_out |= {n for n in weights if n.endswith(("position_ids", "rotary_emb.inv_freq"))}
        for side in ("encoder", "decoder"):
            write_sharded(new / side, part_entries(weights, side, dtype, left_out), max_shard_bytes)
        for head in ("projector", "policy"):
            write_file(new / f"{head}.safetensors", part_entries(weights, head, dtype))
        total = sum(p.stat().st_size for p in new.rglob("*") if p.is_file())
        if max_total_bytes and total > max_total_bytes:
            raise ValueError(f"{out}: expected at most {max_total_bytes} bytes, found {total}")
        if out.exists():  # a card, licences; but no weights of an earlier export
            for old in sorted(out.rglob("*")):
                place = new / old.relative_to(out)
                weights_file = old.parent != out and re.fullmatch(r"model.*\.safetensors(\.index\.json)?", old.name)
                if old.is_file() and not place.exists() and not weights_file:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(old, place)
        exchange(new, out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def export_policy(weights, path, dtype=torch.bfloat16):
    """The policy alone, put into its place in one step."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, part_entries(weights, "policy", dtype))
    os.replace(temporary, path)


def export(cfg, model, tokenizer, out, **options):
    """The same of a model in memory."""
    weights = {n: Stored(t.dtype, tuple(t.shape), lambda a=None, b=None, t=t: t.detach()) for n, t in model.state_dict().items()}
    export_weights(cfg, weights, tokenizer, out, **options)


SHAPE_KEYS = {
    "decoder": ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                "max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings").split(),
    "encoder": ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
                "type_vocab_size layer_norm_eps").split(),
}


def load_side(folder, side):
    """(shape, {our name: Stored}) of an encoder's or decoder's directory that export_weights wrote; `side` tells which."""
    stored = json.loads((folder / "config.json").read_text())
    weights = {f"{side}.{k}": v for k, v in open_weights(folder).items()}
    if side == "decoder" and stored["tie_word_embeddings"]:
        weights["decoder.lm_head.weight"] = weights["decoder.model.embed_tokens.weight"]
    return {k: stored[k] for k in SHAPE_KEYS[side]}, weights


def load_directory(folder):
    """(model in fp32 with the stored, rounded weights, refrag.json) of a model directory. With a shared vocabulary and mean pooling it
    is one that this trainer made from a shape; any other is read as pretrained.py does."""
    folder = Path(folder)
    refrag = json.loads((folder / "refrag.json").read_text())
    weights = {f"{part}.{k}": v for part in ("projector", "policy") for k, v in open_weights(folder / f"{part}.safetensors").items()}
    how = refrag["encoder"]
    if how["vocabulary"] != "shared" or how["pooling"] != "mean" or how["normalize"] or not how["special_tokens"]:
        from .pretrained import PretrainedRefrag, directory_weights, fill

        sides = {side: {"path": str(folder / side)} for side in ("decoder", "encoder")}
        model = PretrainedRefrag({"decoder": sides["decoder"], "encoder": sides["encoder"] | how, "policy": refrag["policy"]})
        fill(model, weights | directory_weights(folder / "decoder", "decoder") | directory_weights(folder / "encoder", "encoder"))
        return model.eval(), refrag
    cfg = {"policy": refrag["policy"]}
    for side in SHAPE_KEYS:
        cfg[side], of_side = load_side(folder / side, side)
        weights |= of_side
    model = Refrag(cfg)
    model.load_state_dict({k: v.read().float() for k, v in weights.items()})
    return model.eval(), refrag


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the model's TOML, or a stage's that names it")
    parser.add_argument("--checkpoint", help="a stage's last.pt or, of a sharded run, its folder `weights`; without one, random weights")
    parser.add_argument("--tokenizer", help="the shared tokenizer.json; not with [decoder] path")
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-shard-size", type=int, metavar="BYTES",
                        help=f"of a file of encoder or decoder (default {SMALL_SHARD}, with [decoder] path {LARGE_SHARD})")
    parser.add_argument("--max-total-size", type=int, metavar="BYTES", help="refuse to write a larger directory")
    parser.add_argument("--policy-only", metavar="NAME", help="write the checkpoint's policy alone, as OUT/NAME")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    cfg = read_config(args.config)
    if args.policy_only and not args.checkpoint:
        parser.error("--policy-only: expected --checkpoint beside it, found none")
    if "path" not in cfg["decoder"] and not args.tokenizer and not args.policy_only:
        parser.error("--tokenizer: expected a tokenizer.json, found none")
    options = {"max_shard_bytes": args.max_shard_size, "max_total_bytes": args.max_total_size, "dtype": DTYPES[args.dtype]}
    try:
        if args.policy_only:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            export_policy(open_weights(args.checkpoint), Path(args.out) / args.policy_only, DTYPES[args.dtype])
        elif args.checkpoint:
            export_weights(cfg, open_weights(args.checkpoint), args.tokenizer, args.out, **options)
        else:
            torch.manual_seed(0)
            if "path" in cfg["decoder"]:
                from .pretrained import load_pretrained

                export(cfg, load_pretrained(cfg), args.tokenizer, args.out, **options)
            else:
                export(cfg, load_model(cfg), args.tokenizer, args.out, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"export: {error}") from None


if __name__ == "__main__":
    main()
