"""Makes tests/golden/lora/: adapters as `peft` saves them, on tests/golden/networks/llama2, and the logits of `peft`'s network.

    python -m weights_tools.make_golden_lora

  NAME/              adapter_config.json and adapter_model.safetensors of save_pretrained, with random factors
  logits.safetensors NAME: F32 [ids, vocabulary], of the ids in networks/llama2.json, in fp32; the adapter beside the weights, not merged.
                     two: of `attention` and `everything`, one after the other
"""
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

GOLDEN = Path(__file__).parent.parent / "tests/golden"
BASE = GOLDEN / "networks/llama2"
OUT = GOLDEN / "lora"
ADAPTERS = {
    "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "everything": dict(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True, rank_pattern={"down_proj": 5, "layers.1.self_attn.q_proj": 2},
                       alpha_pattern={"up_proj": 11}),
    "expression": dict(r=2, lora_alpha=7.5, target_modules=r".*\.mlp\.(gate|up)_proj"),
    "one-layer": dict(r=2, lora_alpha=6, target_modules=["o_proj", "lm_head", "model.layers.0.mlp.down_proj"], layers_to_transform=[1], layers_pattern="layers"),
}


def base():
    return LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    ids = torch.tensor([json.loads((GOLDEN / "networks/llama2.json").read_text())["ids"]])
    logits = {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        n_factors = 0
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * (0.25 if "lora_A" in key else 0.15)
                n_factors += 1
        model.save_pretrained(OUT / name)
        (OUT / name / "README.md").unlink()
        with torch.no_grad():
            logits[name] = model(ids).logits[0].clone()
            plain = base()(ids).logits[0]
        print(name, n_factors // 2, "matrices, logits moved by", float((logits[name] - plain).abs().max()))
    model = PeftModel.from_pretrained(base(), OUT / "attention").merge_and_unload()
    model = PeftModel.from_pretrained(model, OUT / "everything").eval()
    with torch.no_grad():
        logits["two"] = model(ids).logits[0].clone()
    save_file({name: value.contiguous() for name, value in logits.items()}, OUT / "logits.safetensors")
    for path in OUT.glob("*/adapter_config.json"):  # the path of this machine is nobody's business
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = "tests/golden/networks/llama2"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
