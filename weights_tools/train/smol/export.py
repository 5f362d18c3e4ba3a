"""Writes what a stage of refrag-smol left.

    OUT/adapter/    the decoder's adapter as PEFT reads it: adapter_config.json, adapter_model.safetensors
    OUT/model/      a model directory whose decoder has the adapter merged in, in bf16

Before the encoder is trained the directory has a small random one: `refrag` runs it with everything expanded (--policy all) only. Before the policy is,
that is random: --policy bm25, all or none.

    python -m weights_tools.train.smol.export weights_tools/train/configs/smol/reader.toml --out OUT [--checkpoint last.pt]
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import RobertaConfig, RobertaModel

from weights_tools.gguf import llama_config, llama_weights, tokenizer_config, tokenizer_json, write_json

from ..common import read_config
from ..export import exchange, refrag_config
from ..model import Policy, Projector
from .decoder import LINEARS
from .model import BOS, EOS, PAD, Smol, open_gguf, place, take_weights

UNTRAINED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def adapter_config(cfg):
    d = cfg["decoder"]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": d["base"], "r": d["rank"], "lora_alpha": d["alpha"],
            "lora_dropout": 0.0, "bias": "none", "target_modules": list(LINEARS), "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
            "modules_to_save": None, "inference_mode": True}


def merged(weights, adapter, scale):
    """{Hugging Face name: fp32 tensor} with W + scale * B A in place of W."""
    for name, weight in weights:
        weight, at = torch.from_numpy(weight), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{at}.lora_A.weight" in adapter:
            weight = weight + scale * adapter[f"{at}.lora_B.weight"].float() @ adapter[f"{at}.lora_A.weight"].float()
        yield name, weight


def save(tensors, path):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def write(cfg, model, gguf, out):
    out = Path(out)
    new = out.with_name(out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    for folder in ("adapter", "model/decoder", "model/encoder"):
        (new / folder).mkdir(parents=True)
    adapter = {k: v.bfloat16() for k, v in model.decoder.exported().items()}  # what is merged is what is shipped
    save(adapter, new / "adapter/adapter_model.safetensors")
    (new / "adapter/adapter_config.json").write_text(json.dumps(adapter_config(cfg), indent=2) + "\n")

    config, decoder = llama_config(gguf), new / "model/decoder"
    save({k: v.bfloat16() for k, v in merged(llama_weights(gguf), adapter, model.decoder.scale)}, decoder / "model.safetensors")
    write_json(decoder / "config.json", config | {"torch_dtype": "bfloat16"})
    write_json(decoder / "tokenizer.json", tokenizer_json(gguf))
    write_json(decoder / "tokenizer_config.json", tokenizer_config(gguf))
    write_json(decoder / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False})

    torch.manual_seed(0)
    heads, policy = {}, cfg["policy"]
    if hasattr(model, "encoder"):
        encoder_config, weights, heads["projector"] = model.encoder.config, model.encoder.exported(), model.projector
    else:
        encoder_config = RobertaConfig(**(cfg["encoder"] | UNTRAINED), vocab_size=config["vocab_size"], bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
        encoder = RobertaModel(encoder_config, add_pooling_layer=False)
        weights = {k: v for k, v in encoder.state_dict().items() if "position_ids" not in k and "token_type_ids" not in k}
        heads["projector"] = Projector(UNTRAINED["hidden_size"], config["hidden_size"])
    shape = (policy[k] for k in ("dim", "hidden_dim", "n_heads", "n_layers", "norm_eps", "sees_question"))
    heads["policy"] = model.policy if hasattr(model, "policy") else Policy(encoder_config.hidden_size, *shape)
    write_json(new / "model/encoder/config.json", encoder_config.to_dict() | {"architectures": ["RobertaModel"], "torch_dtype": "bfloat16"})
    shutil.copyfile(decoder / "tokenizer.json", new / "model/encoder/tokenizer.json")
    save({k: v.bfloat16() for k, v in weights.items()}, new / "model/encoder/model.safetensors")
    for name, head in heads.items():
        save({k: v.bfloat16() for k, v in head.state_dict().items()}, new / f"model/{name}.safetensors")
    (new / "model/refrag.json").write_text(json.dumps(refrag_config(cfg), indent=2) + "\n")
    exchange(new, out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--checkpoint", help="default: last.pt of the stage")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    gguf = open_gguf(cfg)
    checkpoint = args.checkpoint or place(cfg["run"]["out"]) / "last.pt"
    held = {k.split(".")[0] for k in torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]}
    model = Smol(cfg, held & {"encoder", "policy"}, gguf)
    take_weights(model, checkpoint)
    place(args.out).parent.mkdir(parents=True, exist_ok=True)
    write(cfg, model, gguf, place(args.out))


if __name__ == "__main__":
    main()
