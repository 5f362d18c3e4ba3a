"""refrag-smol's trainer on toy networks, in fp32: the lean decoder, rows, the encoder, and every stage's loss.

    python -m unittest weights_tools.train.test_smol
"""
import json
import tempfile
import unittest

import numpy as np
import torch
from transformers import RobertaModel

from .common import read_config
from .smol import cpt, policy, reader, reconstruct, sft, warm
from .smol.decoder import LeanDecoder, Rows
from .smol.model import PAD, Smol, reader_of, settle_projector
from .smol.questions import Template
from .smol.rows import Branched, pack
from .toy_smol import CONFIGS, VOCABULARY, ToyRun, ids, toy_model, toy_pair


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

    def test_frozen_and_without_adapter(self):
        theirs, lean = toy_pair()
        base = {k.replace(".base_layer", ""): v for k, v in theirs.get_base_model().state_dict().items() if "lora" not in k}
        bare, frozen, rows = LeanDecoder(lean.config, base, rank=0), lean.frozen(), Rows((30,), lean.dtype)
        x = lean.embeddings(torch.tensor(ids(np.random.default_rng(3), 30)))
        adapted = lean.hidden(x, rows)
        lean.unmerge()
        untouched = lean.hidden(x, rows)
        for decoder, expected in ((bare, untouched), (frozen, adapted)):
            decoder.merge()
            self.close(decoder.hidden(x, rows), expected, "hidden")
        self.assertGreater((untouched - adapted).abs().max(), 0.01)

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


class Descends(unittest.TestCase):
    """Each stage's loss on one batch of toy data, before and after some steps of Adam on what the stage trains."""

    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(2)
        cls.kept = tempfile.TemporaryDirectory()
        cls.toy = ToyRun(cls.kept.name)
        tokenizer = cls.toy.folder / "data/tokenizer.json"
        cls.template = Template(tokenizer, read_config(CONFIGS / "model.toml")["template"], 2)
        cls.ids = np.load(cls.toy.folder / "data/text/novels.npy").astype(np.int64)
        cls.passages = [json.loads(line) for line in (cls.toy.folder / "data/tasks/squad.jsonl").read_text(encoding="utf-8").splitlines()]

    @classmethod
    def tearDownClass(cls):
        cls.kept.cleanup()

    def model(self, parts=("encoder",)):
        return Smol(read_config(self.toy.config("warm", 1)), parts)

    def descends(self, model, networks, loss, share, steps=25, lr=1e-2):
        for name, module in model.named_children():
            module.requires_grad_(name in networks)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        first = loss().item()
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            model.parameters_changed()
        self.assertLess(loss().item(), share * first)

    def test_reader(self):
        model, p = self.model(()), self.passages[0]
        rows = [Branched(self.template.context([p]), [(self.template.question(q), self.template.answer(a)) for q, a in p["qas"]])]
        self.descends(model, {"decoder"}, lambda: reader.part_loss(model, rows)[0], 0.7)

    def test_warm(self):
        model = self.model()
        model.maps = warm.Maps(8, 48)
        chunks = self.ids[: 8 * 16].reshape(16, 8).tolist()
        loss = lambda: warm.warm_loss(model, chunks, 64, np.random.default_rng(0))[0]  # noqa: E731
        self.descends(model, {"encoder", "projector", "maps"}, loss, 0.5)

    def test_reconstruct(self):
        model = self.model()
        rows = [reconstruct.rebuilt_row(self.template, [7], self.ids[at : at + 8], 4) for at in (0, 100, 200)]
        settle_projector(model, [c for r in rows for _, c in r.slots], 0.5)
        self.descends(model, {"encoder", "projector"}, lambda: model.loss(pack(rows, torch.float32))[0], 0.9)

    def split(self, model, p):
        """(rows, teacher's hidden states) of two windows' parts"""
        rows, said = [], []
        for at in (0, 300):
            window = self.ids[at : at + 100]
            expanded = {1, 5} if p else set()
            row, taught = cpt.split_row(self.template, window, 8, 9, expanded, 20)
            rows.append(row)
            said.append(cpt.read_as_tokens(model, model.decoder, self.template, [window])[0][taught])
        return rows, torch.cat(said)

    def test_continual_pretraining(self):
        model = self.model()
        rows, said = self.split(model, 0.25)
        taught, head = torch.ones(len(said)), model.decoder.head
        loss = lambda: model.loss(pack(rows, torch.float32), taught, said)[0] + self.divergence(model, rows, said, head)  # noqa: E731
        self.descends(model, {"encoder", "projector"}, loss, 0.95)

    @staticmethod
    def divergence(model, rows, said, head):
        """KL from the teacher, by hand; its gradient is that of the teaching."""
        batch = pack(rows, torch.float32)
        ours, theirs = (model.hidden(batch)[batch.taught()] @ head.T).log_softmax(1), (said @ head.T).log_softmax(1)
        return (theirs.exp() * (theirs - ours)).sum(1).mean()

    def test_taught_gradient_is_that_of_the_divergence(self):
        model = self.model()
        rows, said = self.split(model, 0.25)
        parameters = [p for n, p in model.named_parameters() if n.startswith(("encoder", "projector"))]

        def gradients(loss):
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

        batch = pack(rows, torch.float32)
        found = gradients(model.loss(batch, torch.ones(len(said)), said)[0])
        expected = gradients(self.divergence(model, rows, said, model.decoder.head))
        self.assertLess((found - expected).norm(), 1e-4 * expected.norm())

    def test_teacher_reads_the_full_context(self):
        """Every target's teacher is the reader's state after the same tokens, all of them read as tokens in a row that ends there."""
        model = self.model()
        rows, said = self.split(model, 0.25)
        at = 0
        for row, start in zip(rows, (0, 300)):
            window = self.ids[start : start + 100]
            for place in [*range(8, 16), *range(40, 48), *range(72, 92)]:
                alone = pack([Branched([*self.template.text, *window[:place].tolist()])], torch.float32)
                self.assertLess((model.hidden(alone)[-1] - said[at]).abs().max(), 1e-4)
                self.assertEqual(int(pack([row], torch.float32).labels[pack([row], torch.float32).taught()][at % 36]), int(window[place]))
                at += 1
        self.assertEqual(at, len(said))

    def test_everything_expanded_is_the_full_context(self):
        model = self.model()
        window = self.ids[:100]
        row, _ = cpt.split_row(self.template, window, 8, 9, set(range(9)), 20)
        self.assertEqual(row.context, [*self.template.text, *window[:92].tolist()])
        self.assertEqual(row.slots, [])
        task = self.task(8)
        full = sft.context_of(self.template, task, set(range(len(task.chunks))))
        self.assertEqual(full.ids, self.template.context(self.passages[:3]))

    def task(self, k, n=3):
        passages = self.passages[:n]
        asked = [(q, a, i) for i, p in enumerate(passages) for q, a in p["qas"]]
        return sft.Task(self.template, passages, asked, lambda ids, k: [ids[i : i + k] for i in range(0, len(ids), k)], k)

    def test_sft(self):
        model, task = self.model(), self.task(8)
        row = sft.question_row(self.template, task, {0, 3})
        lesson = pack([row.lesson], torch.float32)
        with torch.no_grad():
            said = model.hidden(lesson)[lesson.taught()]
        batch = pack([row], torch.float32)
        self.assertEqual(batch.labels[batch.taught()].tolist(), lesson.labels[lesson.taught()].tolist())
        taught = torch.full((len(said),), 0.5)
        self.descends(model, {"encoder", "projector", "decoder"}, lambda: model.loss(pack([row], torch.float32), taught, said)[0], 0.7)

    def test_chosen_chunks(self):
        task, rng = self.task(8), np.random.default_rng(0)
        held = {h for q in task.qas for h in q[3]}
        self.assertTrue(held)
        n = min(3, len(held))
        self.assertLessEqual(sft.chosen(self.template, task, n, "answers", rng), held)
        found = [sft.chosen(self.template, task, 5, "bm25", np.random.default_rng(i)) for i in range(20)]
        self.assertTrue(all(len(f) == 5 for f in found))
        # BM25 puts the chunk with a question's rarest word first.
        title = self.passages[0]["title"].split()[0]
        names = [i for i, c in enumerate(task.chunks) if title in self.template.segments.tokenizer.decode(list(c))]
        task.qas = [q for q in task.qas if title in q[0]]
        self.assertTrue(names and task.qas)
        self.assertTrue(set(names) & sft.chosen(self.template, task, len(names), "bm25", rng))

    def test_rewards_are_minus_the_mean_nll(self):
        model, task = self.model(("encoder", "policy")), self.task(8)
        question, answer = task.qas[0][1], task.qas[0][2]
        asked = [(task, [5], question, answer, [0])]
        found = policy.rewards_of(model, self.template, asked, torch.tensor([[[0, 1], [2, 3]]]))
        for j, picks in enumerate(({0, 1}, {2, 3})):
            row = sft.context_of(self.template, task, picks).row([(question, answer)])
            batch = pack([row], torch.float32)
            with torch.no_grad():
                logits = model.decoder.logits(model.hidden(batch)[batch.taught()])
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            self.assertAlmostEqual(float(found[0, j]), -float(nll), places=4)

    def test_policy(self):
        model, task = self.model(("encoder", "policy")), self.task(8)
        asked = [(task.chunks, self.template.segments(q[0]), q[3]) for q in task.qas if q[3]][:4]
        self.descends(model, {"policy"}, lambda: policy.imitation(model, asked, 8)[0], 0.6)

    def test_reader_of_a_checkpoint_stays(self):
        model = self.model()
        row = pack([Branched(self.ids[:30].tolist())], torch.float32)
        with torch.no_grad():
            for p in model.decoder.adapters.parameters():
                p.normal_(0, 0.1)
            model.decoder.merge()
            wanted = model.hidden(row)
            torch.save({"model": model.state_dict()}, self.toy.folder / "some.pt")
            for p in model.decoder.adapters.parameters():
                p.normal_(0, 0.1)
            model.decoder.merge()
            ours = model.hidden(row)
            teacher = reader_of(model, self.toy.folder / "some.pt")
            self.assertTrue(torch.equal(model.hidden(row, teacher), wanted))
            self.assertTrue(torch.equal(model.hidden(row), ours))
            self.assertFalse(torch.equal(ours, wanted))
            for p in model.decoder.adapters.parameters():
                p.zero_()
            model.decoder.merge()
            self.assertTrue(torch.equal(model.hidden(row, teacher), wanted))

    def test_encoder_is_that_of_transformers(self):
        """Chunks of several lengths, padded; word embeddings are the table times V."""
        model = self.model()
        encoder = model.encoder
        theirs = RobertaModel(encoder.config, add_pooling_layer=False).eval()
        theirs.load_state_dict({k: v.float() for k, v in encoder.exported().items()}, strict=False)
        chunks = [self.ids[:8].tolist(), self.ids[8:12].tolist()]
        with torch.no_grad():
            found = encoder(chunks)
            for c, f in zip(chunks, found):
                expected = theirs(torch.tensor([[1, *c, 2]])).last_hidden_state[0].mean(0)
                self.assertLess((f - expected).abs().max(), 1e-4)
        self.assertEqual(encoder.config.pad_token_id, PAD)
        self.assertNotEqual(PAD, 2)


if __name__ == "__main__":
    unittest.main()
