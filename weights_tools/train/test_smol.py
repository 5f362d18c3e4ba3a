"""refrag-smol's trainer on toy networks: a decoder of two layers, in fp32.

    python -m unittest weights_tools.train.test_smol
"""
import json
import os
import subprocess
import tempfile
import unittest
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from weights_tools.gguf import Gguf, llama_config, llama_weights

from .facts import FactMaker
from .model import chunked
from .smol import cpt, export, policy, reader, reconstruct, sft, warm
from .smol.decoder import LINEARS, LeanDecoder, Rows
from .smol.model import PAD, Smol, reader_of, settle_projector
from .smol.questions import Template, near_passages
from .smol.rows import Branched, Pieces, pack

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


class SameAsTransformers(unittest.TestCase):
    """Hidden states, logits and every gradient of the adapter and of the inputs, to 1e-4 of the largest."""

    def close(self, found, expected, what):
        error = (found - expected).abs().max() / expected.abs().max()
        self.assertLess(error, 1e-4, what)

    def test_forward_and_gradients(self):
        theirs, lean = toy_pair()
        rng = np.random.default_rng(0)
        lengths = (37, 300, 5)
        rows = [torch.tensor(ids(rng, n)) for n in lengths]
        wanted = [torch.randn(n, VOCABULARY) for n in lengths]
        theirs_x = [theirs.get_input_embeddings()(r).detach().requires_grad_() for r in rows]
        total = 0.0
        for x, w in zip(theirs_x, wanted):
            logits = theirs(inputs_embeds=x[None]).logits[0]
            total = total + (logits * w).sum()
        total.backward()

        x = lean.embeddings(torch.cat(rows)).clone().requires_grad_()
        logits = lean.logits(lean.hidden(x, Rows(lengths, lean.dtype)))
        ((logits * torch.cat(wanted)).sum()).backward()
        with torch.no_grad():
            self.close(logits, torch.cat([theirs(r[None]).logits[0] for r in rows]), "logits")
        self.close(x.grad, torch.cat([t.grad for t in theirs_x]), "inputs")
        theirs_grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora" in n}
        adapters, grads = lean.adapters, [{n: p.grad.clone() for n, p in a.items()} for a in lean.adapters]
        with torch.no_grad():  # gradients in the adapter's place are exported as weights are
            for adapter, g in zip(adapters, grads):
                for n, p in adapter.items():
                    p.copy_(g[n])
        for name, found in lean.exported().items():
            self.close(found, theirs_grads[name], name)

    def test_one_block_or_many(self):
        _, lean = toy_pair()
        x = torch.randn(400, 48)
        found = [lean.hidden(x, Rows((150, 250), lean.dtype, block=b)) for b in (16, 64, 999)]
        self.close(found[0], found[2], "blocks of 16")
        self.close(found[1], found[2], "blocks of 64")

    def test_unmerged_is_the_base(self):
        theirs, lean = toy_pair()
        lean.unmerge()
        row = torch.tensor(ids(np.random.default_rng(1), 20))
        with torch.no_grad(), theirs.disable_adapter():
            self.close(lean.logits(lean.hidden(lean.embeddings(row), Rows((20,), lean.dtype))), theirs(row[None]).logits[0], "logits")

    def test_exported_adapter_is_taken(self):
        _, a = toy_pair(seed=0)
        _, b = toy_pair(seed=1)
        b.take(a.exported())
        for p, q in zip(a.adapters.parameters(), b.adapters.parameters()):
            self.assertTrue(torch.equal(p, q))


class Branches(unittest.TestCase):
    def test_a_branch_is_a_row_of_its_own(self):
        _, lean = toy_pair()
        rng = np.random.default_rng(2)
        rows = [Branched(ids(rng, n), [(ids(rng, int(rng.integers(2, 30))), ids(rng, int(rng.integers(1, 6)))) for _ in range(m)])
                for n, m in ((200, 5), (17, 1), (140, 3))]
        alone = [Branched(r.context, [branch]) for r in rows for branch in r.branches]

        model = toy_model(lean)

        def gradients(some):
            lean.zero_grad()
            loss, nll = reader.part_loss(model, some)
            loss.backward()
            return nll, [p.grad.clone() for p in lean.adapters.parameters()]

        (nll, grads), (nll_alone, grads_alone) = gradients(rows), gradients(alone)
        self.assertLess((nll - nll_alone).abs().max(), 1e-4)
        for a, b in zip(grads, grads_alone):
            self.assertLess((a - b).abs().max(), 1e-4 * b.abs().max() + 1e-7)

    def test_labels_and_numbers(self):
        found = pack([Branched([7, 8], [([9], [1, 2]), ([5], [3])])], torch.float32)
        self.assertEqual(found.ids.tolist(), [7, 8, 9, 1, 2, 5, 3])
        self.assertEqual(found.labels.tolist(), [-100, -100, 1, 2, -100, 3, -100])
        self.assertEqual(found.branch.tolist(), [-1, -1, 0, 0, -1, 1, -1])
        self.assertEqual(found.rows.positions.tolist(), [0, 1, 2, 3, 4, 2, 3])
        self.assertAlmostEqual(float(found.weight[2]), 0.5**0.5, places=6)


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
        writer = GGUFWriter(self.folder / "toy.gguf", "llama")
        tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
        writer.add_context_length(c["max_position_embeddings"])
        writer.add_embedding_length(c["hidden_size"])
        writer.add_block_count(c["num_hidden_layers"])
        writer.add_feed_forward_length(c["intermediate_size"])
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in self.SPECIALS else 1 for t in tokens])
        writer.add_token_merges([" ".join(m) for m in bpe["merges"]])
        for add, i in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
            add(i)
        dim, wide, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
        shapes = {"attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim), "ffn_gate": (wide, dim), "ffn_up": (wide, dim),
                  "ffn_down": (dim, wide), "attn_norm": (dim,), "ffn_norm": (dim,)}
        named = {"token_embd.weight": (len(tokens), dim), "output_norm.weight": (dim,)}
        for i in range(c["num_hidden_layers"]):
            named |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes.items()}
        for name, shape in named.items():
            value = torch.rand(shape, generator=generator) + 0.5 if "norm" in name else torch.randn(shape, generator=generator) * 0.2
            writer.add_tensor(name, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

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
            "decoder": {"gguf": str(self.folder / "toy.gguf"), "rank": 4, "alpha": 8, "neutral_token": 9}, "encoder": toy_cfg()["encoder"], "policy": toy_cfg()["policy"],
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


STAGES = ["reader", "warm", "reconstruct", "cpt", "cpt-lora", "sft", "policy"]
MAINS = {"reader": reader, "warm": warm, "reconstruct": reconstruct, "cpt": cpt, "cpt-lora": cpt, "sft": sft, "policy": policy}


def binary():
    """The runtime, where it is built."""
    found = [REPOSITORY / "build/refrag", *(Path(p) for p in [os.environ.get("REFRAG_BINARY", "")] if p)]
    return next((str(p) for p in found if p.is_file()), None)


class Stages(unittest.TestCase):
    """All stages one after another, as run_all.py runs them, each for a few steps."""

    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(2)
        cls.kept = tempfile.TemporaryDirectory()
        cls.toy = ToyRun(cls.kept.name)
        cls.log = StringIO()
        cls.configs = {}
        with redirect_stdout(cls.log):
            for i, stage in enumerate(STAGES):
                cls.configs[stage] = cls.toy.config(stage, i)
                MAINS[stage].main(cls.configs[stage])

    @classmethod
    def tearDownClass(cls):
        cls.kept.cleanup()

    def weights(self, stage, checkpoint="last.pt"):
        return torch.load(self.toy.folder / stage / checkpoint, weights_only=True)["model"]

    def learnt(self, stage, before):
        """Networks of which a stage changed a weight."""
        a, b = self.weights(stage), self.weights(before)
        return {k.split(".")[0] for k in a if k in b and not torch.equal(a[k], b[k])}

    def test_each_stage_changes_its_networks_alone(self):
        self.assertEqual(self.learnt("warm", "reader"), set())
        self.assertEqual(self.learnt("reconstruct", "warm"), {"encoder", "projector"})
        self.assertEqual(self.learnt("cpt", "reconstruct"), {"encoder", "projector"})
        self.assertEqual(self.learnt("cpt-lora", "cpt"), {"encoder", "projector", "decoder"})
        self.assertEqual(self.learnt("sft", "cpt-lora"), {"encoder", "projector", "decoder"})
        self.assertEqual(self.learnt("policy", "sft"), set())
        self.assertIn("policy", {k.split(".")[0] for k in self.weights("policy")})
        self.assertNotIn("maps", {k.split(".")[0] for k in self.weights("reconstruct")})

    def test_a_stopped_stage_goes_on_to_the_same_weights(self):
        for stage in ("warm", "cpt-lora", "policy"):
            with self.subTest(stage):
                number, half = STAGES.index(stage), str(self.toy.folder / f"{stage}-half")
                with redirect_stdout(self.log):
                    for steps in (1, self.toy.STEPS):
                        # The learning rate and the curriculum follow max_steps: the first run is cut, not shorter.
                        module, path = MAINS[stage], self.toy.config(stage, number, {"out": half})
                        real = module.train
                        module.train = cut_after(real, steps)
                        try:
                            module.main(path)
                        finally:
                            module.train = real
                a, b = self.weights(stage), self.weights(f"{stage}-half")
                for name in a:
                    self.assertTrue(torch.equal(a[name], b[name]), name)

    def test_export(self):
        for stage in ("reader", "policy"):
            with self.subTest(stage):
                out = self.toy.folder / f"exported-{stage}"
                cfg = export.read_config(self.configs[stage])
                export.main([str(self.configs[stage]), "--out", str(out)])
                tensors = load_file(out / "model/decoder/model.safetensors")
                self.assertIn("model.layers.1.mlp.down_proj.weight", tensors)
                if stage == "policy":
                    state = self.weights(stage)
                    table = tensors["model.embed_tokens.weight"].float()
                    words = load_file(out / "model/encoder/model.safetensors")["embeddings.word_embeddings.weight"]
                    self.assertTrue(torch.equal(words, (table @ state["encoder.directions"]).bfloat16()))
                    self.assertEqual(words.shape, (len(table), cfg["encoder"]["hidden_size"]))
                    head = load_file(out / "model/projector.safetensors")
                    self.assertTrue(torch.equal(head["fc2.bias"], state["projector.fc2.bias"].bfloat16()))
                if binary():
                    shown = subprocess.run([binary(), "inspect", "-m", str(out / "model")], capture_output=True, text=True)
                    self.assertEqual(shown.returncode, 0, shown.stderr)

    def test_merged_weights_are_the_adapter_on_the_base(self):
        out = self.toy.folder / "exported-sft"
        export.main([str(self.configs["sft"]), "--out", str(out)])
        base = dict(llama_weights(Gguf(self.toy.folder / "toy.gguf")))
        adapter, merged = load_file(out / "adapter/adapter_model.safetensors"), load_file(out / "model/decoder/model.safetensors")
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            a, b = (adapter[f"base_model.{name}.lora_{x}.weight"].float() if f"base_model.{name}.lora_{x}.weight" in adapter
                    else adapter[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
            expected = torch.from_numpy(base[f"{name}.weight"]) + 2.0 * b @ a
            self.assertLess((merged[f"{name}.weight"].float() - expected).abs().max(), 0.01)
            self.assertGreater((b @ a).abs().max(), 0)


def cut_after(train, steps):
    """`train` that is told to stop after so many steps."""
    def cut(cfg, model, loss_of, *more):
        def counted(rng, fraction, number):
            if number == (steps - 1) * cfg["run"]["parts"] and steps < cfg["run"]["max_steps"]:
                os.kill(os.getpid(), 15)
            return loss_of(rng, fraction, number)

        try:
            train(cfg, model, counted, *more)
        except SystemExit as stopped:
            assert stopped.code == 3
    return cut


if __name__ == "__main__":
    unittest.main()
