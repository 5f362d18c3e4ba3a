"""Checks of the trainer's optimizer: rates of single networks, and Muon's matrices shared out over processes.

    python -m unittest weights_tools.train.test_optimizer
"""
import copy
import threading
import unittest
from unittest import mock

import torch

from . import common
from .common import Optimizer, SharedMuon, World
from .model import Refrag
from .test_train import SHAPE


class Optimizers(unittest.TestCase):
    def test_networks_may_learn_at_rates_of_their_own(self):
        model = Refrag(SHAPE)
        optimizer = Optimizer(model, {"muon": True, "lr": 2.0, "adam_lr": 3.0, "weight_decay": 0.1, "rates": {"decoder": 0.25}}, World("cpu", 1))
        optimizer.set_scale(0.5)
        names = {id(p): n for n, p in model.named_parameters()}
        seen = []
        for part, lr in optimizer.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    name = names[id(p)]
                    self.assertEqual(group["lr"], lr * 0.5 * (0.25 if name.startswith("decoder.") else 1.0), name)
                    self.assertEqual(group["weight_decay"], 0.1 if p.ndim >= 2 else 0.0, name)
                    self.assertEqual(lr, 2.0 if p.ndim == 2 and "layer" in name else 3.0, name)
                    seen.append(name)
        self.assertEqual(sorted(seen), sorted(names.values()))
        with self.assertRaisesRegex(AssertionError, r"expected \[1, 2\] groups, found \[2, 4\]: muon, rates"):
            Optimizer(model, {"muon": True, "lr": 2.0}, World("cpu", 1)).load_state_dict(optimizer.state_dict())

    def test_muon_is_that_of_pytorch(self):
        theirs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(((24, 40), (40, 24), (16, 16)))]
        ours = [p.clone() for p in theirs]
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
        muon = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
        shared = SharedMuon(ours, World("cpu", 1), **options)
        with mock.patch.object(common, "cpu_multiplies_bf16", lambda: True):
            for step in range(3):
                for i, (p, q) in enumerate(zip(theirs, ours)):
                    p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
                muon.step()
                shared.step()
        for p, q in zip(theirs, ours):
            self.assertTrue(torch.equal(p, q))
            self.assertTrue(torch.equal(muon.state[p]["momentum_buffer"], shared.state[q]["momentum_buffer"]))

    def test_newton_schulz_in_fp32_is_its_polynomial_of_the_singular_values(self):
        a, b, c = coefficients = 3.4445, -4.775, 2.0315
        for shape in ((24, 40), (40, 24), (16, 16)):
            matrix = torch.randn(shape, generator=torch.Generator().manual_seed(7))
            with mock.patch.object(common, "cpu_multiplies_bf16", lambda: False):
                found = common.orthogonalised(matrix, coefficients, 5, 1e-7)
            u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
            s /= s.norm()
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            self.assertEqual(found.dtype, torch.float32)
            # a rounding unit of 2^-24 grows at most a-fold an iteration (the slope at 0): 3.4445^5 = 485 units
            self.assertLess((found - u @ s.diag() @ v).abs().max().item(), 485 * 2**-24)

    def test_matrices_shared_out_over_processes_end_with_the_same_bits(self):
        opt, start = {"muon": True, "lr": 0.02, "adam_lr": 0.01}, Refrag(SHAPE)

        def three_steps(world, answers, rank, saved=None):
            model = copy.deepcopy(start)
            optimizer = Optimizer(model, opt, world)
            if saved:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(copy.deepcopy(saved[1]))
            for step in range(3):
                for i, p in enumerate(optimizer.params):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
                optimizer.step(1.0)
            answers[rank] = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict()), optimizer.parts[0][0].mine

        def two_processes(saved=None):
            answers, meeting, values = {}, threading.Barrier(2), [None, None]

            class Rank:
                size = 2

                def __init__(self, rank):
                    self.rank = rank

                def gather(self, value):
                    values[self.rank] = value
                    meeting.wait(60)
                    got = list(values)
                    meeting.wait(60)
                    return got

                def sum(self, tensor):
                    a, b = self.gather(tensor.clone())
                    return tensor.copy_(a + b)

            threads = [threading.Thread(target=three_steps, args=(Rank(r), answers, r, saved)) for r in range(2)]
            for t in threads:
                t.start()
            for t in threads:
                t.join(120)
            return answers

        alone = {}
        three_steps(World("cpu", 1), alone, 0)
        together = two_processes()
        n_matrices = len(alone[0][2])
        self.assertEqual(together[0][2] | together[1][2], set(range(n_matrices)))
        self.assertFalse(together[0][2] & together[1][2])
        self.assertTrue(together[0][2] and together[1][2])
        # A run of one process goes on as a run of two, and the other way round.
        later = {}
        three_steps(World("cpu", 1), later, 0, together[1][:2])
        later_together = two_processes(alone[0][:2])
        for (want, states, _), got in ((alone[0], together), (later[0], later_together)):
            for rank in range(2):
                for key in want:
                    self.assertTrue(torch.equal(got[rank][0][key], want[key]), key)
                for a, b in zip(states, got[rank][1]):
                    self.assertEqual(a["state"].keys(), b["state"].keys())
                    for i in a["state"]:
                        self.assertTrue(all(torch.equal(a["state"][i][k], b["state"][i][k]) for k in a["state"][i]))


if __name__ == "__main__":
    unittest.main()
