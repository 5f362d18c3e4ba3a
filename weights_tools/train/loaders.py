"""Batches made ahead by other processes, for devices that would wait for them: a stage's work split into making and loss.

Makers are forked, so that they share what is loaded; they touch no device and no random state but the generator they are given.
A batch is a function of (seed, step, part) and the fraction of the stage that is done, so it does not matter who makes it. Under a
time limit the fraction of a step to come is guessed from the clock; under max_steps alone it is exact.
"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch


class Made:
    """loss_of for common.train(): loss(make(rng, fraction, number)). What `make` returns must be picklable, without tensors."""

    def __init__(self, make, loss):
        self.make, self.loss = make, loss

    def __call__(self, rng, fraction, number):
        return self.loss(self.make(rng, fraction, number))


making = None  # the function in forked processes: a closure cannot be sent


def make_one(seed, step, part, fraction, number):
    torch.set_num_threads(1)
    return making(np.random.default_rng([seed, step, part]), fraction, number)


class Loader:
    """Batches of this process's parts of every step, `ahead` steps ahead, made by `n_processes` others."""

    def __init__(self, make, run, parts, mine, n_processes, ahead=3):
        global making
        making = make
        self.seed, self.parts, self.mine, self.ahead, self.max_steps = run["seed"], parts, mine, ahead, run["max_steps"]
        self.pool = ProcessPoolExecutor(n_processes, mp_context=multiprocessing.get_context("fork"))
        self.asked = {}

    def take(self, step, part, share_of_time):
        """The batch of a part; share_of_time: of max_seconds, by now."""
        for later in range(step, min(step + self.ahead, self.max_steps - 1) + 1):
            for p in self.mine:
                if (later, p) not in self.asked and (later, p) >= (step, part):
                    fraction = max(later / self.max_steps, share_of_time)
                    self.asked[later, p] = self.pool.submit(make_one, self.seed, later, p, fraction, later * self.parts + p)
        return self.asked.pop((step, part)).result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)
