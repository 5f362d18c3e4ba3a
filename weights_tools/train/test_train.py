"""Quick checks of the trainer: hand-computed values, every stage on toy data (it learns, and it resumes exactly), and the
runtime's log-probabilities beside the trainer's where build/refrag (or $REFRAG_BINARY) exists.

    python -m unittest weights_tools.train.test_train
"""
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import tempfile
import unittest
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import attention, common, cpt, curriculum, facts, grpo, prepare, pretrain, reconstruct, run_all, sft
from .batches import Qa, Segments, Text
from .common import load_model, read_config
from .corpora import Deduper, first_sentences
from .evaluate import log_perplexity
from .export import export, load_directory
from .facts import KINDS, FactMaker
from .model import BOS, EOS, IGNORE, MixedBatch, Refrag, chunked, n_expand
from .prepare import make_tokenizer
from .stage import open_questions
from .tasks import Factbook, Facts, Tasks

SHAPE = {
    "decoder": dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
                    tie_word_embeddings=True),
    "encoder": dict(vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=40, type_vocab_size=1, layer_norm_eps=1e-5),
    "policy": dict(dim=16, hidden_dim=32, n_heads=2, n_layers=2, norm_eps=1e-5, sees_question=True),
}


class Values(unittest.TestCase):
    def test_advantages_by_hand(self):
        a = grpo.advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]))
        s = math.sqrt((4 + 1 + 0 + 9) / 4)  # mean 3
        torch.testing.assert_close(a, torch.tensor([[-2 / s, -1 / s, 0.0, 3 / s], [0.0] * 4]))

    def test_pick_probabilities_by_hand(self):
        logits = torch.tensor([[0.0, math.log(2.0), math.log(3.0), float("-inf")]])
        p = grpo.pick_log_probs(logits, torch.tensor([[[2, 0], [1, 2]]])).exp()
        torch.testing.assert_close(p, torch.tensor([[[3 / 6, 1 / 3], [2 / 6, 3 / 4]]]))

    def test_draws_follow_the_probabilities(self):
        logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
        picks = grpo.sample_picks(logits, 2, 40000, torch.Generator().manual_seed(1))[0]
        share = ((picks[:, 0] == 2) & (picks[:, 1] == 1)).float().mean().item()
        self.assertAlmostEqual(share, 5 / 8 * 2 / 3, delta=0.01)

    def test_surrogate_clips(self):
        new, old = torch.log(torch.tensor([[[1.5]], [[0.5]]])), torch.zeros(2, 1, 1)
        j = grpo.surrogate(new, old, torch.tensor([[1.0], [-1.0]]), 0.2)
        self.assertAlmostEqual(j.item(), (1.2 - 0.8) / 2, places=6)

    def test_n_expand(self):
        self.assertEqual([n_expand(p, 7) for p in (0, 1, 0.01, 0.25, 0.5)], [0, 7, 1, 2, 4])
        self.assertEqual(n_expand(0.5, 0), 0)

    def test_curriculum_is_the_papers(self):
        sizes = [1, 2, 4, 8, 16, 32]
        first, middle, last = (curriculum.shares(sizes, f) for f in (0.0, 0.5, 1.0))
        np.testing.assert_allclose(first, np.array([1333, 333, 83, 20, 5, 1]) / 1775)
        np.testing.assert_allclose(last, np.array([0.2, 137, 447, 1719, 2125, 2496]) / 6924.2)
        # The table's fifth of nine stages: 16, 213, 193, 185, 103, 50 samples.
        np.testing.assert_allclose(middle, np.array([16, 213, 193, 185, 103, 50]) / 760, atol=0.002)
        self.assertEqual(curriculum.draw(np.random.default_rng(0), sizes, 0.0, curriculum=False), 32)
        self.assertEqual({curriculum.draw(np.random.default_rng(i), sizes, 0.0, 0) for i in range(60)}, set(sizes))
        self.assertEqual({curriculum.draw(np.random.default_rng(i), sizes, 0.7, 0.6) for i in range(60)}, set(sizes))
        for i in range(60):  # a curriculum that takes half of the run is at its middle after a quarter
            same = [curriculum.draw(np.random.default_rng(i), sizes, *at) for at in ((0.25, 0.5), (0.5, True))]
            self.assertEqual(*same)

    def test_repeats_are_dropped(self):
        long = " ".join(f"word{i}" for i in range(60))
        d = Deduper()
        d.hold_out(" ".join(f"test{i}" for i in range(60)))
        self.assertTrue(d.keeps("a", long))
        self.assertFalse(d.keeps("a", long.upper() + "!"))               # the same but for case and punctuation
        self.assertFalse(d.keeps("a", long + " and five words more here"))  # nearly the same
        self.assertTrue(d.keeps("a", long + " and five words more here", near=False))
        self.assertFalse(d.keeps("a", "New: " + " ".join(f"test{i}" for i in range(20, 50))))
        self.assertTrue(d.keeps("a", "Yes.") and d.keeps("a", "Yes."))    # too short to count
        self.assertEqual(first_sentences("One. Two is longer. Three.", 20), "One. Two is longer.")

    def test_even_places_read_text_through(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "text").mkdir()
            np.save(Path(folder) / "text/a.npy", np.arange(1000, dtype=np.uint16))
            np.save(Path(folder) / "text/b.npy", np.arange(1000, 3000, dtype=np.uint16))
            text = Text(folder, {"a": 1.0, "b": 3.0})
            read = [text.even(i, 10) for i in range(400)]
            counts = np.bincount(np.concatenate(read), minlength=3000)
            self.assertEqual(sum(r[0] < 1000 for r in read), 100)  # a quarter, to the window
            self.assertGreater((counts[:990] > 0).mean(), 0.8)     # drawn evenly at random: 1 - 1/e
            self.assertLessEqual(counts.max(), 3)

    def test_packed_data_is_unpacked_as_it_was(self):
        with tempfile.TemporaryDirectory() as folder:
            out, book = Path(folder) / "a", "A long paragraph of a textbook. " * 12
            tok = make_tokenizer({"textbooks": [book]}, [], 300)
            for kind in prepare.MADE_AGAIN:
                prepare.write_jsonl(out / f"tasks/{kind}.jsonl", [{"title": kind, "text": f"Of {kind}.", "qas": [["What?", kind]]}])
                prepare.save_text(tok, out, kind, [f"{kind}\nOf {kind}."])
            tok.save(str(out / "tokenizer.json"))
            prepare.save_text(tok, out, "textbooks", ["# Head\n" + book + "\nshort", book])
            prepare.write_jsonl(out / "tasks/cloze.jsonl", [{"title": "", "text": book, "qas": []}] * 2)
            prepare.write_jsonl(out / "test/squad.jsonl", [{"secret": 1}])
            prepare.pack(out, Path(folder) / "packed.tar.xz")
            prepare.unpack(Path(folder) / "packed.tar.xz", Path(folder) / "b")
            for path in sorted(out.rglob("*.*")):
                copy = Path(folder) / "b" / path.relative_to(out)
                if "test" in path.parts:
                    self.assertFalse(copy.exists())
                else:
                    self.assertEqual(path.read_bytes(), copy.read_bytes(), path)

    def test_follow_up_questions_leave_the_name_out(self):
        self.assertEqual(FactMaker.pronoun("How high is the Kanu Tower?", "Kanu", "tower"), "How high is it?")
        self.assertEqual(FactMaker.pronoun("Whom did Kanu Bel marry?", "Kanu Bel", "person"), "Whom did this person marry?")
        rng = np.random.default_rng(0)
        for _ in range(50):
            passages, gold, qas = Facts("test", no_answer=0.5).task(rng, 3)
            if gold is None:
                self.assertEqual({a for _, a in qas}, {"not in the passages"})
                self.assertEqual(len(passages), 2)
            else:
                self.assertTrue(all(a in passages[gold]["text"] for _, a in qas))

    def test_a_conversation_asks_about_every_passage(self):
        tasks, rng = Tasks("", {"facts": [1.0, 5]}, follow_up=0.5), np.random.default_rng(2)
        counts = []
        for _ in range(200):
            _, passages, asked = tasks.conversation(rng, others=2)
            about = [gold for _, _, gold in asked]
            runs = [g for i, g in enumerate(about) if i == 0 or g != about[i - 1]]
            self.assertEqual(len(runs), len(set(runs)))  # questions on one passage follow each other
            for i, (question, answer, gold) in enumerate(asked):
                if gold is None:
                    self.assertEqual(answer, "not in the passages")
                    continue
                self.assertIn(answer, passages[gold]["text"])
                if i == 0 or about[i - 1] != gold:  # only a later question says "it"
                    self.assertIn(passages[gold]["name"], question)
            counts.append(sorted(about.count(i) for i in range(len(passages))))
            self.assertLessEqual(sum(n > 2 for n in counts[-1]), 1)  # but for the task's own passage at most `others`
        self.assertGreater(sum(sum(n > 0 for n in c) > 1 for c in counts), 80)
        for seed in range(20):  # without others it is the task
            first, second = np.random.default_rng(seed), np.random.default_rng(seed)
            _, passages, asked = tasks.conversation(first, others=0)
            _, same, gold, qas = tasks.task(second)
            self.assertEqual((passages, asked), (same, [(q, a, gold) for q, a in qas]))

    def test_factbook_labels(self):
        self.assertEqual(Factbook.label("People and Society / Median age / total"), "median age, total")
        self.assertEqual(Factbook.label("Economy / Exports / Exports 2024"), "exports 2024")

    def test_facts_are_true_and_splits_disjoint(self):
        rng, names = np.random.default_rng(0), {}
        for split in ("train", "test"):
            maker = FactMaker(split)
            names[split] = {maker.name(rng) for _ in range(2000)}
            for kind in KINDS:
                p = maker.passage(rng, kind)
                for question, answer in p["qas"]:
                    self.assertIn(answer, p["text"])
                    self.assertIn(p["name"], question)
        self.assertFalse(names["train"] & names["test"])

    def test_fact_lines_have_one_passage_a_name_and_repeat(self):
        written = list(facts.lines("test", 50, 3, ["city", "river"]))
        self.assertEqual(written, list(facts.lines("test", 50, 3, ["city", "river"])))
        self.assertNotEqual(written, list(facts.lines("test", 50, 4, ["city", "river"])))
        self.assertEqual((len({line["title"] for line in written}), len({line["text"] for line in written})), (50, 50))
        self.assertEqual(len({line["id"] for line in written}), len(written))
        for line in written:
            self.assertIn(line["answers"][0], line["text"])
            self.assertIn("city" if "river" not in line["text"].split(".")[0] else "river", line["text"])


class Networks(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.model = Refrag(SHAPE).eval()

    def test_targets_follow_their_positions(self):
        batch = MixedBatch()
        batch.add_row([("tokens", [0, 7]), ("slot", batch.chunk([9, 9])), ("target", [5, 6])])
        batch.add_row([("tokens", [0]), ("target", [8])])
        ids, labels, slot_at, chunk_of = batch.tensors()
        self.assertEqual(labels.tolist(), [[IGNORE, IGNORE, 5, 6, IGNORE], [8] + [IGNORE] * 4])
        self.assertEqual((slot_at.tolist(), chunk_of.tolist()), ([2], [0]))

    def test_rows_do_not_see_each_other_nor_padding(self):
        def row(batch, ids, chunk):
            batch.add_row([("tokens", [0]), ("slot", batch.chunk(chunk)), ("target", ids)])

        both, alone = MixedBatch(), MixedBatch()
        row(both, [5, 6, 7], [10, 11])
        row(both, [8, 9, 10, 11, 12], [12, 13, 14, 15])
        row(alone, [5, 6, 7], [10, 11])
        torch.testing.assert_close(both.losses(self.model)[0][:3], alone.losses(self.model)[0], atol=1e-5, rtol=1e-5)

    def test_a_row_beyond_the_last_position_is_refused(self):
        self.assertEqual(self.model.hidden(torch.zeros(1, 512, dtype=torch.long)).shape[1], 512)
        with self.assertRaisesRegex(AssertionError, "max_position_embeddings"):
            self.model.hidden(torch.zeros(1, 513, dtype=torch.long))

    def test_short_rows_attend_as_pytorch_does(self):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(3, n, 20, 16, generator=generator, requires_grad=True) for n in (4, 2, 2))
        keep = (torch.arange(20) < torch.tensor([20, 7, 13])[:, None])[:, None, None, :].expand(3, 1, 20, 20)
        for causal, mask in ((True, None), (False, None), (False, keep)):
            module = unittest.mock.Mock(spec=["is_causal"], is_causal=causal)
            ours, _ = attention.short_rows(module, q, k, v, mask, scaling=0.3)
            wide = (x.repeat_interleave(2, 1) for x in (k, v))
            theirs = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask, is_causal=causal, scale=0.3).transpose(1, 2)
            torch.testing.assert_close(ours, theirs)
            upstream = torch.randn(ours.shape, generator=generator)
            for a, b in zip(torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream)):
                torch.testing.assert_close(a, b)

    def test_rotary_table_is_the_function(self):
        model = Refrag(SHAPE)
        table, at = model.decoder.model.rotary_emb, torch.arange(9)[None]
        self.assertIsInstance(table, attention.RotaryTable)
        there = LlamaRotaryEmbedding(model.decoder.config)(torch.zeros(1), at)
        torch.testing.assert_close(table(torch.zeros(1), at), there)
        self.assertNotIn("rotary", " ".join(model.state_dict()))

    def test_vocabulary_loss_is_cross_entropy(self):
        hidden, labels = torch.randn(2, 5, 32), torch.randint(300, (2, 5))
        labels[0, 2] = IGNORE
        weight, w = torch.rand(9), self.model.decoder.lm_head.weight

        def with_gradients(loss_of, precision):
            h = hidden.clone().requires_grad_()
            with common.autocast("cpu", {"precision": precision}):
                loss = loss_of(h)
            w.grad = None
            loss.backward()
            return loss.detach(), h.grad, w.grad

        plain = with_gradients(lambda h: (self.model.token_losses(h, labels) * weight).sum() / weight.sum(), "fp32")
        # Products err by half a unit of the last of 8 bits (bf16) or 24 (fp32), the sums over 32 of them by little more.
        for precision, bound in (("fp32", 2**-21), ("bf16", 2**-7)):
            for a, b in zip(with_gradients(lambda h: self.model.loss(h, labels, weight)[0], precision), plain):
                self.assertEqual(a.dtype, torch.float32)
                self.assertLess(((a - b).norm() / b.norm()).item(), bound)

    def test_precision_follows_the_processor(self):
        self.addCleanup(common.cpu_multiplies_bf16.cache_clear)
        info = unittest.mock.Mock(exists=lambda: True)
        with unittest.mock.patch.object(common, "Path", return_value=info):
            for flags, fast in (("fma avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True)):
                info.read_text = lambda flags=flags: f"processor\t: 0\nflags\t\t: fpu {flags} sse\n"
                common.cpu_multiplies_bf16.cache_clear()
                for run, wanted in (({}, fast), ({"precision": "auto"}, fast), ({"precision": "bf16"}, True), ({"precision": "fp32"}, False)):
                    with common.autocast("cpu", run):
                        self.assertEqual(torch.is_autocast_enabled("cpu"), wanted)
                self.assertTrue(common.computes_in_bf16("cuda", {}))
        with self.assertRaisesRegex(AssertionError, 'precision: expected "auto", "bf16" or "fp32", found "fp16"'):
            common.autocast("cpu", {"precision": "fp16"})

    def test_a_teacher_changes_the_gradient_alone(self):
        rng = np.random.default_rng(4)
        text = unittest.mock.Mock(window=lambda rng, n: rng.integers(3, 300, n))
        batch = MixedBatch()
        for n_chunks in (2, 3):
            cpt.next_paragraph_row(batch, self.model, text, rng, n_chunks, 4, 6, 0.5, {"context": 7, "weight": 0.75})
        rows, lessons = batch.rows, batch.lessons
        batch.finished(multiple=8)
        hidden, labels = batch.hidden(self.model)
        at = labels != IGNORE
        teacher, weight = torch.zeros(int(at.sum()), 300), torch.zeros(int(at.sum()))
        with torch.no_grad():
            for b, (_, ids, n, w) in enumerate(lessons):
                ids = [int(i) for i in ids]
                self.assertEqual(ids[-6:], rows[b][0][-6:])
                logits = self.model.decoder(torch.tensor([ids])).logits[0, -7:-1]
                end = int(at[: b + 1].sum())
                teacher[end - 6 : end], weight[end - 6 : end] = logits.softmax(-1), w
        log_p = self.model.decoder.lm_head(hidden[at]).log_softmax(-1)
        wanted = (1 - weight)[:, None] * torch.nn.functional.one_hot(labels[at], 300) + weight[:, None] * teacher
        self.assertEqual(int((weight > 0).sum()), 12)
        self.assertLess(12, len(weight))  # the expanded chunks' tokens have no teacher
        grads = []
        for loss in (-(wanted * log_p).sum(1).mean(), batch.loss(self.model)):
            self.model.zero_grad()
            loss.backward()
            grads.append(self.model.encoder.embeddings.word_embeddings.weight.grad.clone())
        self.assertLess(((grads[0] - grads[1]).norm() / grads[0].norm()).item(), 2**-6)
        self.assertAlmostEqual(loss.item(), -log_p[torch.arange(len(weight)), labels[at]].mean().item(), places=2)

    def test_policy_ignores_padding(self):
        tasks = [([[5, 6], [7, 8], [9]], [4, 5]), ([[5, 6]], [])]
        both = grpo.policy_logits(self.model, tasks, 2)
        one = grpo.policy_logits(self.model, tasks[1:], 2)
        torch.testing.assert_close(both[1, :1], one[0], atol=1e-5, rtol=1e-5)
        self.assertTrue(torch.isinf(both[1, 1:]).all())


TOY_TEMPLATE = dict(before="", passage_prefix="", passage_suffix="\n", question_prefix="Q: ", question_suffix="\nA:")


def toml(tables):
    def value(v):
        return "{ " + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + " }" if isinstance(v, dict) else json.dumps(v)

    return "".join(f"[{name}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in table.items()) for name, table in tables.items())


class Stages(unittest.TestCase):
    """Every stage on toy data."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.data = data = Path(cls.folder.name)
        words = " ".join(FactMaker("train").passage(np.random.default_rng(i))["text"] for i in range(60))
        make_tokenizer({"textbooks": [words]}, [], 300).save(str(data / "tokenizer.json"))
        ids = np.array(Segments(data / "tokenizer.json")(words) * 3, dtype=np.uint16)
        (data / "text").mkdir()
        np.save(data / "text/a.npy", ids)
        (data / "model.toml").write_text(toml(SHAPE | {"template": TOY_TEMPLATE, "refrag": dict(chunk_len=4, chunk_lens=[4], expand_fraction=0.25)}))
        before = None
        cls.runs = {}
        for module, name, lr in ((pretrain, "pretrain", 1e-2), (reconstruct, "reconstruct", 1e-2), (cpt, "cpt", 5e-3), (sft, "sft", 5e-3), (grpo, "policy", 3e-3)):
            cfg = cls.config(name, before, lr)
            (data / f"{name}.toml").write_text('model = "model.toml"\n' + toml(cfg))
            module.main(data / f"{name}.toml")
            before = data / name / "last.pt"
            cls.runs[name] = module, cfg

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def config(cls, name, init, lr):
        cfg = read_config(Path(__file__).parent / f"configs/nano/{name}.toml")
        run, data = cfg["run"], cfg["data"]
        for key in ("max_seconds", "start_encoder", "init"):
            run.pop(key, None)
        run |= {"out": str(cls.data / name), "max_steps": 40, "print_every": 10, "compile": False, "device": "cpu", "threads": 1, "parts": 2}
        if init:
            run["init"] = str(init)
        if name == "policy":
            run["max_steps"] = 100
            data |= {"imitation": 1.0}  # GRPO has a test of its own
        cfg["optimizer"] |= {"lr": lr, "adam_lr": lr}
        data |= {"folder": str(cls.data), "weights": {"a": 1.0}, "tasks": {"facts": [1.0, 2]}, "phases": [[0, 4, 64, 0.2, 0.3]], "positions": 256,
                 "lengths": [128], "target": 16, "max_context": 300, "max_asked": 150, "chunk_lens": [4], "chunk_len_weights": [1.0], "n_chunks": [1, 2, 4],
                 "group": 4, "imitation_tasks": 16, "text_context": [32], "text_target": 16}
        return {k: cfg[k] for k in ("run", "optimizer", "data")}

    def loss_on_same_batches(self, name, checkpoint):
        """Mean loss of the stage's own batches of one late part of the run, under a checkpoint or (None) under what it began with."""
        module, cfg = self.runs[name]
        seen = []

        def instead(cfg_, model, loss_of, trainable, world):
            start = checkpoint or cfg_["run"].get("init")
            if start:
                model.load_state_dict(torch.load(start, weights_only=True)["model"])
            with torch.no_grad():
                for i in range(12):
                    seen.append(float(loss_of(np.random.default_rng([99, i]), 0.3, i)[0]))

        with unittest.mock.patch.object(module, "train", instead):
            module.main(self.data / f"{name}.toml")
        return float(np.mean(seen))

    def test_a_training_goes_on_from_a_model_directory(self):
        cfg = read_config(self.data / "sft.toml")
        export(cfg, load_model(cfg, self.data / "cpt/last.pt"), self.data / "tokenizer.json", self.data / "carried", dtype=torch.float32)
        want, got = (load_model(cfg, self.data / start, ["policy"]).state_dict() for start in ("cpt/last.pt", "carried"))
        for key in want:
            self.assertTrue(key.startswith("policy.") or torch.equal(want[key], got[key]), key)
        torch.manual_seed(1)
        random = Refrag(cfg).state_dict()
        torch.manual_seed(1)
        for key, value in load_model(cfg, self.data / "carried/decoder").state_dict().items():
            self.assertTrue(torch.equal(value, (want if key.startswith("decoder.") else random)[key]), key)
        tokenizer = self.data / "carried/decoder/tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        with self.assertRaisesRegex(AssertionError, "expected the tokenizer of .*carried/decoder/tokenizer.json, found another"):
            load_model(cfg, self.data / "carried")

    def test_run_all_starts_at_a_stages_border(self):
        configs = self.data / "configs"
        configs.mkdir()
        for name in ("cpt", "sft", "policy"):
            (configs / f"{name}.toml").write_text(f'base = "../{name}.toml"\n[run]\nout = "{configs / name}"\n')
        started = []

        def run(command, **_):
            started.append((command[-2], read_config(command[-1])))
            return unittest.mock.Mock(returncode=0)

        with unittest.mock.patch.object(subprocess, "run", run):
            run_all.main([str(configs), "--first", "sft", "--init", str(self.data)])
        (first, sft_cfg), (second, policy_cfg) = started
        self.assertEqual((first, second), ("weights_tools.train.sft", "weights_tools.train.grpo"))
        as_it_is = read_config(configs / "sft.toml")
        self.assertEqual(sft_cfg, as_it_is | {"base": sft_cfg["base"], "run": as_it_is["run"] | {"init": str(self.data)}})
        self.assertEqual(policy_cfg, read_config(configs / "policy.toml"))
        (configs / "policy-text.toml").write_text(f'base = "policy.toml"\n[run]\nout = "{configs / "policy-text"}"\n')
        with unittest.mock.patch.object(subprocess, "run", run):
            run_all.main([str(configs), "--first", "policy", "--init", str(self.data)])
        self.assertEqual([cfg["run"]["init"] for _, cfg in started[2:]], [str(self.data)] * 2)
        for wrong, message in ((["--first", "sft", "--until", "cpt"], "--first: expected a stage not after cpt"), (["--init", "nowhere"], "found nothing at nowhere"),
                               (["--init", str(self.data)], "pretrain.toml, which is to start from it; found none")):
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), self.assertRaises(SystemExit) as stopped:
                run_all.main([str(configs), *wrong])
            self.assertEqual(stopped.exception.code, 2)
            self.assertIn(message, errors.getvalue())

    def test_every_stage_lowers_its_loss(self):
        for name, factor in (("pretrain", 0.8), ("reconstruct", 0.98), ("cpt", 0.97), ("sft", 0.97), ("policy", 0.97)):
            with self.subTest(name):
                before, after = self.loss_on_same_batches(name, None), self.loss_on_same_batches(name, self.data / name / "last.pt")
                self.assertLess(after, factor * before)

    def test_grpo_finds_what_is_rewarded(self):
        """The reward is the share of picked chunks that lie in the first half."""
        module, cfg = self.runs["policy"]
        cfg = {k: dict(v) for k, v in cfg.items()}
        cfg["run"] |= {"out": str(self.data / "rewarded"), "max_steps": 60, "print_every": 60}
        cfg["optimizer"] = cfg["optimizer"] | {"lr": 1e-2}
        cfg["data"] |= {"text_share": 1.0, "imitation": 0.0, "text_context": [64], "fractions": [0.25], "group": 8}
        (self.data / "rewarded.toml").write_text('model = "model.toml"\n' + toml(cfg))
        seen = []

        def rewards(model, tasks, picks):
            out = [[np.mean([i < 8 for i in pick]) for pick in group] for group in picks.tolist()]  # of 64 / 4 chunks
            seen.append(float(np.mean(out)))
            return torch.tensor(out, dtype=torch.float32)

        with unittest.mock.patch.object(grpo, "rewards_of", rewards):
            module.main(self.data / "rewarded.toml")
        self.assertGreater(np.mean(seen[-20:]), np.mean(seen[:20]) + 0.2)

    def test_only_the_stages_networks_change(self):
        def state(name):
            return torch.load(self.data / name / "last.pt", weights_only=True)["model"]

        for name, init, fixed in (("reconstruct", "pretrain", ("policy",)), ("cpt", "reconstruct", ("policy",)),
                                  ("policy", "sft", ("decoder", "encoder", "projector"))):
            a, b = state(init), state(name)
            for key in a:
                if key.startswith(fixed):
                    self.assertTrue(torch.equal(a[key], b[key]), key)
            for network in {k.split(".")[0] for k in a} - set(fixed):
                self.assertTrue(any(not torch.equal(a[k], b[k]) for k in a if k.startswith(network)), (name, network))

    def test_an_interrupted_run_ends_with_the_same_weights(self):
        for name in ("pretrain", "sft", "policy"):
            module, cfg = self.runs[name]
            cfg = {k: dict(v) for k, v in cfg.items()}
            states = []
            for kind, stops in (("whole", [6]), ("parts", [2, 6])):
                cfg["run"]["out"] = str(self.data / f"{name}-{kind}")
                for stop in stops:
                    # The schedule depends on max_steps: it stays, and the run is told to stop as Ctrl-C would.
                    cfg["run"]["max_steps"] = 6
                    path = self.data / f"{name}-{kind}.toml"
                    path.write_text('model = "model.toml"\n' + toml(cfg))
                    if stop == 6:
                        module.main(path)
                    else:
                        with self.assertRaises(SystemExit) as raised, stopping_after(module, 2 * stop):
                            module.main(path)
                        self.assertEqual(raised.exception.code, 3)
                state = torch.load(self.data / f"{name}-{kind}/last.pt", weights_only=True)
                self.assertEqual(state["step"], 6)
                states.append(state)
            for key, value in states[0]["model"].items():
                self.assertTrue(torch.equal(value, states[1]["model"][key]), f"{name}: {key}")
            self.assertEqual(states[0]["tokens"], states[1]["tokens"])

    def test_batches_made_ahead_are_the_same(self):
        for name in ("pretrain", "sft"):
            module, cfg = self.runs[name]
            states = []
            for loaders in (0, 2):
                out = self.data / f"{name}-{loaders}-loaders"
                cfg = {k: dict(v) for k, v in cfg.items()}
                cfg["run"] |= {"out": str(out), "max_steps": 5, "loaders": loaders}
                (self.data / "ahead.toml").write_text('model = "model.toml"\n' + toml(cfg))
                module.main(self.data / "ahead.toml")
                states.append(torch.load(out / "last.pt", weights_only=True)["model"])
            self.assertTrue(all(torch.equal(states[0][k], states[1][k]) for k in states[0]), name)

    def test_question_rows_of_a_part_are_about_as_long_and_fit(self):
        _, cfg = self.runs["sft"]
        model, data = Refrag(SHAPE), cfg["data"] | {"positions": 700, "max_context": 400, "tasks": {"facts": [1.0, 6]}, "pool": 6}
        qa = open_questions(cfg | {"data": data, "template": TOY_TEMPLATE, "decoder": {}}, model)
        used, many = [], 0
        for seed in range(40):
            rng, batch = np.random.default_rng(seed), MixedBatch()
            rows = sft.draw_rows(data, np.random.default_rng(seed), qa, chunked, 4)
            sft.add_question_rows(batch, model, data, rng, qa, 4)
            lengths = [len(ids) for ids, _, _ in batch.rows]
            self.assertEqual(lengths, [task.length(expanded, qa.suffix) for task, expanded in rows])
            self.assertEqual(lengths, sorted(lengths))
            self.assertTrue(len(lengths) == 1 or len(lengths) * max(lengths) <= data["positions"], lengths)
            self.assertTrue(all(1 <= len(task.qas) and sum(len(q) + len(a) for _, q, a, _ in task.qas) <= 150 for task, _ in rows))
            used += [n / max(lengths) for n in lengths]
            many += len(lengths) > 1
            learnt = sum(sum(learnt) for _, _, learnt in batch.rows)
            answers = [len(answer) for task, _ in rows for _, _, answer, _ in task.qas]
            self.assertEqual(len(batch.weights), learnt)
            self.assertAlmostEqual(sum(batch.weights), sum(n**0.5 for n in answers))
        self.assertGreater(np.mean(used), 0.8)
        self.assertGreater(many, 20)

    def test_holders_are_the_chunks_of_the_answer_in_its_own_passage(self):
        qa = Qa(Segments(self.data / "tokenizer.json"), TOY_TEMPLATE)
        passages = [{"title": "Ash", "text": "The Ash is 40 km long."}, {"title": "Elm", "text": "It is 40 km away from the Elm, which is 73 km long."}]
        task = sft.Task(qa, passages, [("How long is the Elm?", "73 km", 1), ("And the Ash?", "40 km", 0), ("The Oak?", "not in the passages", None)], chunked, 4)
        held = [[task.chunks[i] for i in holders] for _, _, _, holders in task.qas]
        said = ["".join(qa.segments.tokenizer.decode(c) for c in chunks) for chunks in held]
        self.assertIn("73 km", said[0])
        self.assertIn("40 km", said[1])
        self.assertEqual([{task.passage_of[i] for i in holders} for _, _, _, holders in task.qas], [{1}, {0}, set()])

    def test_questions_of_the_policy_are_asked_alone(self):
        model, data = Refrag(SHAPE), self.runs["policy"][1]["data"] | {"questions": 12, "others": 3, "tasks": {"facts": [1.0, 4]}, "max_context": 400}
        qa = open_questions({"data": data, "template": TOY_TEMPLATE, "decoder": {}}, model, follow_up=0.0)
        numbers = set()
        for seed in range(20):
            tasks = grpo.question_tasks(data, np.random.default_rng(seed), model, qa, 4, n=3)
            numbers.add(len(tasks))
            self.assertTrue(all(holders and chunks is tasks[0][0] for chunks, _, _, holders in tasks))
            for _, question, _, _ in tasks:
                words = qa.segments.tokenizer.decode(question).replace("?", "").split()
                self.assertFalse({"it", "this"} & set(words), words)
            together = grpo.policy_logits(model, [t[:2] for t in tasks], 4)
            for logits, (chunks, question, _, _) in zip(together, tasks):
                torch.testing.assert_close(logits, grpo.policy_logits(model, [([list(c) for c in chunks], question)], 4)[0], atol=1e-5, rtol=1e-5)
        self.assertEqual(max(numbers), 3)

    def test_weights_of_targets_count_in_the_loss(self):
        torch.manual_seed(3)
        model, batch = Refrag(SHAPE), MixedBatch()
        batch.add_row([("tokens", [0, 7]), ("target", [5, 6])])
        batch.add_row([("tokens", [0]), ("target", [8])])
        with torch.no_grad():
            each, plain = batch.losses(model)[0], batch.loss(model)
            batch.weights = [0.5, 1.0, 2.5]
            weighted = batch.loss(model)
        torch.testing.assert_close(plain, each.mean(), rtol=2e-2, atol=0)  # bf16 products
        torch.testing.assert_close(weighted, (each * torch.tensor([0.5, 1.0, 2.5])).sum() / 4, rtol=2e-2, atol=0)
        self.assertGreater((weighted - plain).abs(), 0.01)

    def test_text_to_be_written_back_is_marked(self):
        _, cfg = self.runs["cpt"]
        text, model = Text(self.data, {"a": 1.0}), Refrag(SHAPE)
        data = cfg["data"] | {"shares": {"compressed": 0, "mixed": 0, "rebuild": 1, "plain": 0, "questions": 0}}
        batch, generators = MixedBatch(), [np.random.default_rng(i) for i in (1, 2)]
        self.assertEqual(cpt.text_step(batch, model, data, text, *generators, 1.0), "rebuild k4")
        self.assertGreater(len(batch.rows), 1)
        for ids, slots, learnt in batch.rows:
            self.assertEqual([t for t, _ in slots], list(range(1, 1 + len(slots))))
            self.assertEqual(ids[1 + len(slots)], EOS)
            self.assertEqual(learnt, [False] * (2 + len(slots)) + [True] * (4 * len(slots)))
            self.assertEqual(ids[2 + len(slots) :], [t for _, c in slots for t in batch.chunks[c]])

    def test_chunks_are_recalled_by_a_few_of_their_tokens(self):
        _, cfg = self.runs["cpt"]
        text, model = Text(self.data, {"a": 1.0}), Refrag(SHAPE)
        data = cfg["data"] | {"shares": {"compressed": 0, "mixed": 0, "recall": 1, "plain": 0, "questions": 0}, "n_chunks": [4], "rebuilt": 12}
        batch, generators = MixedBatch(), [np.random.default_rng(i) for i in (1, 2)]
        self.assertEqual(cpt.text_step(batch, model, data, text, *generators, 1.0), "recall k4")
        self.assertGreater(len(batch.rows), 1)
        orders, keys = set(), set()
        for ids, slots, learnt in batch.rows:
            self.assertEqual([t for t, _ in slots], [1, 2, 3, 4])
            chunks = [list(batch.chunks[c]) for _, c in slots]
            at, order = 5, []
            while at < len(ids):
                self.assertEqual((ids[at], learnt[at : at + 3]), (EOS, [False] * 3))
                end = next((i for i in range(at + 3, len(ids)) if not learnt[i]), len(ids))
                found = [i for i, c in enumerate(chunks) if ids[at + 1 : end] == c[-(end - at - 1) :]]
                self.assertTrue(found, (ids[at:end], chunks))
                order.append(found[0])
                keys.add(end - at - 3)
                at = end
            self.assertEqual(len(order), 3)  # `rebuilt` tokens of them
            orders.add(tuple(order))
        self.assertGreater(len(orders), 3)
        self.assertEqual(keys, {1, 2})  # targets: a key stands at the chunk's beginning or later

    def test_every_configuration_can_be_read(self):
        for path in sorted((Path(__file__).parent / "configs").rglob("*.toml")):
            cfg = read_config(path)
            self.assertTrue({"decoder", "encoder", "policy", "template"} <= cfg.keys(), path)
            if path.name != "model.toml":
                self.assertTrue({"seed", "out", "max_steps"} <= cfg["run"].keys() and "lr" in cfg["optimizer"], path)

    def test_runtime_gives_the_trainers_log_probabilities(self):
        binary = Path(os.environ.get("REFRAG_BINARY", "build/refrag"))
        if not binary.exists():
            self.skipTest(f"{binary}: not built")
        cfg = read_config(self.data / "policy.toml")
        export(cfg, load_model(cfg, self.data / "policy/last.pt"), self.data / "tokenizer.json", self.data / "dir", dtype=torch.float32)
        model, refrag = load_directory(self.data / "dir")
        rng, segments = np.random.default_rng(5), Segments(self.data / "tokenizer.json")
        passages, _, qas = Facts("test", no_answer=0.0).task(rng, 2)
        (self.data / "passages.jsonl").write_text("".join(json.dumps({"id": str(i), "title": p["title"], "text": p["text"]}) + "\n" for i, p in enumerate(passages)))

        def run(*arguments):
            done = subprocess.run([binary, *arguments, "-m", self.data / "dir", "--device", "cpu"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout)

        qa = Qa(segments, TOY_TEMPLATE)
        for policy, expanded in (("none", lambda n: set()), ("all", lambda n: set(range(n)))):
            said = run("run", "--passages", self.data / "passages.jsonl", "-q", qas[0][0], "-n", "8", "--ignore-eos", "--policy", policy, "--json",
                       "--logprobs", "3")
            task = sft.Task(qa, passages, [], chunked, 4)
            batch = MixedBatch()
            pieces = task.context(batch, expanded(len(task.chunks)), BOS, qa.suffix) + [("tokens", qa.question(qas[0][0]))]
            tokens = [t["id"] for t in said["logprobs"]]
            batch.add_row([*pieces, ("target", tokens)])
            with torch.no_grad():
                ours = -batch.losses(model)[0]
            theirs = torch.tensor([t["logprob"] for t in said["logprobs"]])
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        ids = segments("".join(f"{p['title']} {p['text']} " for p in passages) * 3)
        (self.data / "text.txt").write_text(segments.tokenizer.decode(ids))
        ids = segments((self.data / "text.txt").read_text())
        rows = run("eval", "perplexity", "--text", self.data / "text.txt", "--context", "32", "--output", "16", "-k", "4", "-p", "0,0.5", "-o", "json")
        windows = [ids[i : i + 48] for i in range(0, len(ids) - 47, 48)]
        for row in rows:
            with torch.no_grad():
                value, _ = log_perplexity(model, windows, 32, row["mode"], row["k"], row["p"], row["policy"])
            self.assertAlmostEqual(row["log_perplexity"], value, delta=1e-4, msg=str(row))


@contextlib.contextmanager
def stopping_after(module, n_parts):
    """Ctrl-C after so many parts of a step of a stage's run."""
    true_train = module.train

    def instead(cfg, model, loss_of, trainable, world):
        count = 0

        def counted(*arguments):
            nonlocal count
            count += 1
            if count == n_parts:
                signal.raise_signal(signal.SIGINT)
            return loss_of(*arguments)

        return true_train(cfg, model, counted, trainable, world)

    with unittest.mock.patch.object(module, "train", instead):
        yield


if __name__ == "__main__":
    unittest.main()
