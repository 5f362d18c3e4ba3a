"""Writes the goldens of LLaMA's relatives, and of BERT: a small random model of each family, and what `transformers` computes with it in fp32.

    python -m weights_tools.make_golden_families [--out tests/golden/networks]

Files as make_golden.py's, which also says what they hold. Seeds are fixed. Never run by the tests.
"""
import argparse
from pathlib import Path

import torch
from transformers import (BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM)

from .make_golden import encoder_sequences, llama_golden, randomize, roberta_outputs, save_config, save_tensors, weights_of, write_json

BASE = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, vocab_size=64, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2, pad_token_id=None, attn_implementation="eager")
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

# name: (model, configuration, what config.json is written in the older spelling)
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**BASE, head_dim=8, rope_parameters=PLAIN), True),
    # The second layer sees 16 entries.
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config(**BASE, head_dim=8, use_sliding_window=True, sliding_window=16, max_window_layers=1, rope_parameters=PLAIN), False),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**BASE, head_dim=12, tie_word_embeddings=True, rope_parameters=PLAIN), False),
    "mistral-window": (MistralForCausalLM, MistralConfig(**BASE, head_dim=8, sliding_window=20, rope_parameters=PLAIN), True),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**(BASE | {"hidden_size": 32}), rope_parameters=PLAIN), False),
    # The second of three layers does not rotate, and sees 24 entries.
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**(BASE | {"num_hidden_layers": 3, "hidden_size": 32}), no_rope_layers=[1, 0, 1], use_sliding_window=True,
                                                  sliding_window=24, rope_parameters=PLAIN), False),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig(**BASE, head_dim=16, rope_parameters=YARN), False),
    "llama-dynamic": (LlamaForCausalLM, LlamaConfig(**BASE, head_dim=16, rope_parameters=DYNAMIC), True),
}


def make_bert(out):
    """With a masked-token head, which the encoder leaves alone, and two types."""
    config = BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40, max_position_embeddings=32)
    model = randomize(BertForMaskedLM(config), 50, torch.float32)
    sequences = encoder_sequences(torch.Generator().manual_seed(51), [18, 1, 32, 2, 10], 64)
    save_config(out / "bert", config)
    save_tensors(out / "bert/model.safetensors", {n: t for n, t in model.state_dict().items() if n != "cls.predictions.decoder.weight"})
    save_tensors(out / "bert.safetensors", roberta_outputs(model.bert, sequences))
    write_json(out / "bert.json", {"sequences": sequences})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tests/golden/networks"))
    out = parser.parse_args().out
    for seed, (name, (kind, config, older)) in enumerate(FAMILIES.items(), 30):
        model = kind(config)
        model.set_attn_implementation("eager")
        randomize(model, seed, torch.float32, embed_std=0.3 if config.tie_word_embeddings else 0.6)
        save_config(out / name, model.config, old_spelling=older)
        save_tensors(out / name / "model.safetensors", weights_of(model))
        with torch.no_grad():
            llama_golden(out, name, model, seed + 100)
    with torch.no_grad():
        make_bert(out)


if __name__ == "__main__":
    main()
