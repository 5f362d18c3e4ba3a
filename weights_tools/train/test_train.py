"""Quick checks of the trainer: hand-computed values, and the networks on their own. test_stages.py runs the stages.

    python -m unittest weights_tools.train.test_train
"""
import math
import tempfile
import unittest
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import attention, common, cpt, curriculum, facts, grpo, prepare
from .batches import Text
from .corpora import Deduper, first_sentences
from .facts import KINDS, FactMaker
from .model import IGNORE, MixedBatch, Refrag, n_expand
from .prepare import make_tokenizer
from .tasks import Factbook, Facts, Tasks
from .words import fit_words, inverse_frequency

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

    def test_words_are_found_at_every_position(self):
        found = inverse_frequency([{1, 2}, {1}, {1, 3}, {1, 3}], 5)
        torch.testing.assert_close(found, torch.tensor([0.0, 0.0, math.log(4), math.log(2), 0.0]))

        # Chunks of 4 words, a word's direction another one at each position, as of an encoder that spells its chunks out.
        rng = np.random.default_rng(0)
        chunks = rng.integers(0, 200, (4000, 4))
        directions = torch.from_numpy(rng.standard_normal((4, 200, 64))).float()
        turn = [torch.linalg.qr(torch.from_numpy(rng.standard_normal((64, 64))))[0].float() for _ in range(4)]
        x = sum(directions[0][chunks[:, i]] @ turn[i] for i in range(4))
        weight, bias = fit_words(x[:3000], [set(c.tolist()) for c in chunks[:3000]], 200, 32, torch.Generator().manual_seed(1))
        seen, unseen = x[:3000] @ weight.T + bias, x[3000:] @ weight.T + bias
        self.assertLess(seen.mean(0).abs().max(), 1e-3)
        self.assertAlmostEqual(float(seen.std()), 1.0, places=2)

        def likeness(z, shared):
            z = torch.nn.functional.normalize(z, dim=1)
            pairs = [(a, b) for a in range(300) for b in range(a) if len({*chunks[3000 + a]} & {*chunks[3000 + b]}) == shared]
            return float(torch.stack([z[a] @ z[b] for a, b in pairs]).mean())

        self.assertLess(abs(likeness(unseen, 0)), 0.02)
        self.assertGreater(likeness(unseen, 1), 0.1)
        self.assertLess(likeness(x[3000:], 1), 0.1)

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
            for flags, fast in (("fma avx2 avx512f", False), ("avx512f avx512_bf16", False), ("avx512f avx512_bf16 amx_bf16 amx_tile", True)):
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


if __name__ == "__main__":
    unittest.main()
