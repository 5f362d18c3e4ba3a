"""What the tests of refrag-smol's trainer train on: networks of two layers, a GGUF file, data and configurations of their size."""
import json
import struct
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from .facts import FactMaker
from .model import chunked
from .smol.decoder import LINEARS, LeanDecoder
from .smol.model import Smol
from .smol.questions import near_passages
from .smol.run_all import NAMES as STAGES

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "weights_tools/train/configs/smol"
VOCABULARY = 300


def toy_config():
    return {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": True, "rope_scaling": None}


def toy_pair(rank=4, seed=0):
    """(LLaMA of `transformers` with an adapter of `peft`, lean decoder with the same weights)"""
    torch.manual_seed(seed)
    c = toy_config()
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in c.items() if k != "model_type"}, attn_implementation="eager"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.15)
    lean = LeanDecoder(c, {k: v.clone() for k, v in theirs.state_dict().items()}, rank=rank, scale=2.0)
    theirs = get_peft_model(theirs, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), lora_dropout=0.0))
    with torch.no_grad():
        for p in lean.adapters.parameters():
            p.normal_(0, 0.1)
    lean.merge()
    state = {k.replace(".weight", ".default.weight"): v for k, v in lean.exported().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not any("lora" in k for k in missing)
    return theirs, lean


def toy_model(lean, parts=(), seed=0):
    """A `Smol` around a lean decoder."""
    torch.manual_seed(seed)
    model = Smol.__new__(Smol)
    torch.nn.Module.__init__(model)
    model.cfg, model.decoder, model.end, model.cut = toy_cfg(), lean, 2, chunked
    model.add(model.cfg, parts)
    return model


def toy_cfg():
    return {"decoder": {"neutral_token": 9}, "template": {},
            "encoder": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
                        "type_vocab_size": 1, "layer_norm_eps": 1e-5},
            "policy": {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2, "norm_eps": 1e-5, "sees_question": True}}


def ids(rng, n):
    return rng.integers(0, VOCABULARY, n).tolist()


def gguf_bytes(keys, tensors):
    """A GGUF file of version 3: {key: text, whole number, fraction or list of one of them}, {name: fp32 tensor}."""
    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(v):
        """(type, bytes)"""
        if isinstance(v, str):
            return 8, text(v)
        if isinstance(v, list):
            return 9, struct.pack("<IQ", value(v[0])[0], len(v)) + b"".join(value(x)[1] for x in v)
        return (6, struct.pack("<f", v)) if isinstance(v, float) else (4, struct.pack("<I", v))

    out, offset, data = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))], 0, b""
    for key, v in keys.items():
        kind, raw = value(v)
        out.append(text(key) + struct.pack("<I", kind) + raw)
    for name, t in tensors.items():
        shape = tuple(reversed(t.shape))  # the file names the fastest dimension first
        out.append(text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", 0, offset))
        raw = t.numpy().astype("<f4").tobytes()
        data += raw + bytes(-len(raw) % 32)
        offset = len(data)
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + data


class ToyRun:
    """A folder with a GGUF file, data and the stages' configurations, all of them small."""

    SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reserved>")
    STEPS = 3

    def __init__(self, folder):
        self.folder = Path(folder)
        rng, maker = np.random.default_rng(3), FactMaker("train")
        passages = [maker.passage(rng) for _ in range(40)]
        texts = [f"{p['title']}\n{p['text']}" for p in passages]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=list(self.SPECIALS), show_progress=False,
                                                                 initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        for name in ("data/tasks", "data/text", "data/validation"):
            (self.folder / name).mkdir(parents=True)
        tokenizer.save(str(self.folder / "data/tokenizer.json"))
        self.write_gguf(json.loads(tokenizer.to_str())["model"])
        squad = [{"title": p["title"], "text": p["text"], "qas": p["qas"]} for p in passages]
        lines = [{"id": str(i), "title": p["title"], "text": p["text"], "question": p["qas"][0][0], "answers": [p["qas"][0][1]]} for i, p in enumerate(squad)]
        for name, rows in (("tasks/squad", squad), ("validation/squad", lines[:4])):
            (self.folder / f"data/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        np.save(self.folder / "data/tasks/squad-near.npy", near_passages([json.loads(json.dumps(p)) for p in squad]))
        np.save(self.folder / "data/text/novels.npy", np.array(tokenizer.encode("\n".join(texts)).ids, dtype=np.uint16))
        (self.folder / "data/validation/novels.txt").write_text("\n".join(texts[:12]), encoding="utf-8")

    def write_gguf(self, bpe):
        c, generator = toy_config(), torch.Generator().manual_seed(5)
        tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
        keys = {
            "general.architecture": "llama", "llama.context_length": c["max_position_embeddings"], "llama.embedding_length": c["hidden_size"],
            "llama.block_count": c["num_hidden_layers"], "llama.feed_forward_length": c["intermediate_size"],
            "llama.attention.head_count": c["num_attention_heads"], "llama.attention.head_count_kv": c["num_key_value_heads"],
            "llama.attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3 if t in self.SPECIALS else 1 for t in tokens],
            "tokenizer.ggml.merges": [" ".join(m) for m in bpe["merges"]],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        }
        dim, wide, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
        shapes = {"attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim), "ffn_gate": (wide, dim), "ffn_up": (wide, dim),
                  "ffn_down": (dim, wide), "attn_norm": (dim,), "ffn_norm": (dim,)}
        named = {"token_embd.weight": (len(tokens), dim), "output_norm.weight": (dim,)}
        for i in range(c["num_hidden_layers"]):
            named |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes.items()}
        tensors = {name: torch.rand(shape, generator=generator) + 0.5 if "norm" in name else torch.randn(shape, generator=generator) * 0.2
                   for name, shape in named.items()}
        (self.folder / "toy.gguf").write_bytes(gguf_bytes(keys, tensors))

    CHANGES = {
        "warm": {"tokens": 256, "random": 64},
        "reconstruct": {"positions": 120, "n_chunks": [1, 2]},
        "cpt": {"window": 200, "positions": 120, "target": 16, "n_chunks": [2, 4, 8], "watched": 2, "watched_context": 64},
        "cpt-lora": {"n_chunks": [4, 8], "hold": 0.5}, "sft": {"text": 0.3},
        "policy": {"begin_with_words": 200, "imitation": 0.5, "imitation_tasks": 2, "imitation_questions": 2, "group_tasks": 2, "group": 3},
    }

    def config(self, stage, number, run=None):
        """Path of a stage's configuration: the real one with toy sizes."""
        changes = {}
        for name in STAGES[STAGES.index("cpt") : number + 1] if number >= STAGES.index("cpt") else [stage]:  # each is a variant of the one before
            changes |= self.CHANGES.get(name, {})
        out = {
            "decoder": {"gguf": str(self.folder / "toy.gguf"), "rank": 4, "alpha": 8, "neutral_token": 9},
            "encoder": toy_cfg()["encoder"], "policy": toy_cfg()["policy"],
            "run": {"precision": "fp32", "max_steps": self.STEPS, "parts": 2, "print_every": 1, "evaluate_every": 1000, "out": str(self.folder / stage),
                    "reader": str(self.folder / "reader/last.pt")} | (run or {}),
            "data": {"folder": str(self.folder / "data"), "max_context": 600, "max_asked": 120} | changes,
        }
        if number:
            out["run"].setdefault("init", str(self.folder / STAGES[number - 1] / "last.pt"))
        if stage not in ("warm", "reconstruct", "cpt"):
            out["data"] |= {"positions": 300}
        text = f'base = "{CONFIGS / stage}.toml"\n'
        for table, values in out.items():
            text += f"[{table}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
        text += "[data.weights]\nnovels = 1.0\n[data.tasks]\nsquad = [0.6, 10]\nfacts = [0.4, 6]\n"
        path = self.folder / f"{stage}{len(list(self.folder.glob('*.toml')))}.toml"
        path.write_text(text, encoding="utf-8")
        return path
