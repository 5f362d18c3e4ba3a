"""Quick checks of the trainer: hand-computed values, and every stage for a few steps on toy data.

    python -m unittest weights_tools.train.test_train
"""
import json
import math
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

from . import common, cpt, facts, grpo, pretrain, reconstruct, sft
from .batches import Qa, Segments
from .facts import KINDS, FactMaker
from .model import IGNORE, MixedBatch, Refrag, n_expand
from .prepare import make_tokenizer

SHAPE = {
    "decoder": dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=16, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True),
    "encoder": dict(vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=40, type_vocab_size=1),
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

    def test_curriculum_moves_from_easy_to_hard(self):
        easy, hard = reconstruct.curriculum([1, 2, 4], 0.0), reconstruct.curriculum([1, 2, 4], 1.0)
        self.assertTrue(easy[0] > easy[2] and hard[0] < hard[2])

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

    def test_vocabulary_loss_is_cross_entropy(self):
        hidden, labels = torch.randn(2, 5, 32), torch.randint(300, (2, 5))
        labels[0, 2] = IGNORE
        weight, w, grads = torch.rand(9), self.model.decoder.lm_head.weight, []
        for fast in (True, False):
            h = hidden.clone().requires_grad_()
            loss = self.model.loss(h, labels, weight)[0] if fast else (self.model.token_losses(h, labels) * weight).sum() / weight.sum()
            w.grad = None
            loss.backward()
            grads.append((loss.detach(), h.grad, w.grad))
        for a, b in zip(*grads):  # bf16 has 8 bits: products err by 2^-8 of their size
            self.assertLess(((a - b).norm() / b.norm()).item(), 2**-7)

    def test_policy_ignores_padding(self):
        tasks = [([[5, 6], [7, 8], [9]], [4, 5]), ([[5, 6]], [])]
        both = grpo.policy_logits(self.model, tasks, 2)
        one = grpo.policy_logits(self.model, tasks[1:], 2)
        torch.testing.assert_close(both[1, :1], one[0], atol=1e-5, rtol=1e-5)
        self.assertTrue(torch.isinf(both[1, 1:]).all())


class Stages(unittest.TestCase):
    """A few steps of every stage on toy data, one interrupted and resumed."""

    def test_all(self):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder)
            words = " ".join(FactMaker("train").passage(np.random.default_rng(i))["text"] for i in range(60))
            make_tokenizer({"textbooks": [words], "novels": [words], "squad": [words], "factbook": [words], "stories": [words]}, [], 300).save(
                str(data / "tokenizer.json"))
            segments = Segments(data / "tokenizer.json")
            np.save(data / "a.npy", np.array(segments(words) * 3, dtype=np.uint16))
            squad = [{"title": t, "passages": [{"text": "The sky is blue.", "qas": [["What is blue?", "sky"]]}]} for t in ("A", "B")]
            (data / "squad_train.json").write_text(json.dumps(squad))
            (data / "model.toml").write_text(
                "".join(f"[{k}]\n" + "".join(f"{a} = {json.dumps(b)}\n" for a, b in v.items()) for k, v in SHAPE.items())
                + '[template]\nbefore=""\npassage_prefix=""\npassage_suffix="\\n"\nquestion_prefix="Q: "\nquestion_suffix="\\nA:"\n')
            before = None
            for module, name in ((pretrain, "pretrain"), (reconstruct, "reconstruct"), (cpt, "cpt"), (sft, "sft"), (grpo, "policy")):
                self.run_stage(data, module, name, before)
                before = data / name / "last.pt"

    def run_stage(self, data, module, name, before):
        cfg = common.read_config(Path(__file__).parent / f"configs/nano/{name}.toml")
        cfg["run"] |= {"out": str(data / name), "max_steps": 3, "print_every": 1}
        cfg["run"].pop("max_seconds")
        if before:
            cfg["run"]["init"] = str(before)
        cfg["data"] |= {"folder": str(data), "weights": {"a": 1.0}, "phases": [[0, 2, 64]], "rows": 2, "length": 64, "target": 16,
                        "max_context": 300, "n_chunks": [1, 2], "tokens": 64, "question_rows": 2, "tasks": 2, "group": 3, "imitation_tasks": 2,
                        "text_context": 64, "text_target": 16}
        lines = [f"{k} = {json.dumps(v)}" for k, v in cfg["data"].items() if not isinstance(v, dict)]
        for table in ("shares", "weights"):
            if table in cfg["data"]:
                lines += [f"{table} = {{ " + ", ".join(f"{a} = {b}" for a, b in cfg["data"][table].items()) + " }"]

        def write(max_steps):
            cfg["run"]["max_steps"] = max_steps
            text = 'model = "model.toml"\n[run]\n' + "\n".join(f"{k} = {json.dumps(v)}" for k, v in cfg["run"].items())
            text += "\n[optimizer]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in cfg["optimizer"].items())
            (data / "run.toml").write_text(text + "\n[data]\n" + "\n".join(lines) + "\n")

        for max_steps in (2, 3):
            write(max_steps)
            module.main(data / "run.toml")
        state = torch.load(data / name / "last.pt", weights_only=False)
        self.assertEqual(state["step"], 3)
        self.assertTrue(all(torch.isfinite(v).all() for v in state["model"].values()))


if __name__ == "__main__":
    unittest.main()
