"""refrag-smol's trainer on toy networks: a decoder of two layers, in fp32.

    python -m unittest weights_tools.train.test_smol
"""
import unittest

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .smol import reader
from .smol.decoder import LINEARS, LeanDecoder, Rows
from .smol.questions import Branched, pack

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

        class Model:
            decoder = lean

        def gradients(some):
            lean.zero_grad()
            loss, nll = reader.part_loss(Model, some)
            loss.backward()
            return nll, [p.grad.clone() for p in lean.adapters.parameters()]

        (nll, grads), (nll_alone, grads_alone) = gradients(rows), gradients(alone)
        self.assertLess((nll - nll_alone).abs().max(), 1e-4)
        for a, b in zip(grads, grads_alone):
            self.assertLess((a - b).abs().max(), 1e-4 * b.abs().max() + 1e-7)

    def test_labels_and_numbers(self):
        found, labels, weight, branch, rows = pack([Branched([7, 8], [([9], [1, 2]), ([5], [3])])], torch.float32)
        self.assertEqual(found.tolist(), [7, 8, 9, 1, 2, 5, 3])
        self.assertEqual(labels.tolist(), [-100, -100, 1, 2, -100, 3, -100])
        self.assertEqual(branch.tolist(), [-1, -1, 0, 0, -1, 1, -1])
        self.assertEqual(rows.positions.tolist(), [0, 1, 2, 3, 4, 2, 3])
        self.assertAlmostEqual(float(weight[2]), 0.5**0.5, places=6)


if __name__ == "__main__":
    unittest.main()
