"""Rows of the decoder's input, before they are tensors: ids and slots of chunks, then branches that do not see each other."""
from dataclasses import dataclass

import numpy as np
import torch

from ..model import IGNORE
from .decoder import Rows


class Branched:
    """A row. context: ids, 0 where a slot is; branches: [(ids before the answer, answer ids)], each of which sees the context and itself alone, its
    positions going on where the context ends; slots: [(place in the context, chunk)], a chunk being its ids; learnt: [(begin, end)] of the context's ids
    that are targets; lesson: ids, without slots, that say the same, and of which the last hold all targets in their order (`pack` of the row's
    `lesson` teaches the row), or None."""

    def __init__(self, context, branches=(), slots=(), learnt=(), lesson=None):
        self.context, self.branches, self.slots, self.learnt, self.lesson = context, branches, slots, learnt, lesson

    def __len__(self):
        return len(self.context) + sum(len(q) + len(a) for q, a in self.branches)


class Pieces:
    """Makes a row's context piece by piece."""

    def __init__(self, ids=()):
        self.ids, self.slots, self.learnt = list(ids), [], []

    def tokens(self, ids, learn=False):
        if learn and len(ids):
            self.learnt.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += [int(i) for i in ids]
        return self

    def slot(self, chunk):
        self.slots.append((len(self.ids), chunk))
        self.ids.append(0)
        return self

    def row(self, branches=(), lesson=None):
        return Branched(self.ids, branches, self.slots, self.learnt, lesson)


@dataclass
class Packed:
    """Rows as tensors. ids [M]; labels [M], the token after each position or IGNORE; weight [M] of labels, an answer counting as the root of its
    length; branch [M], a number for each branch of the batch, -1 elsewhere; row [M]; slot_at [N], the places of `chunks`, slot by slot."""

    ids: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    branch: torch.Tensor
    row: torch.Tensor
    slot_at: torch.Tensor
    chunks: list
    rows: Rows

    def taught(self):
        return self.labels != IGNORE


def visible(n, lengths):
    """bool [T, T] of a context of n positions and branches of these lengths, or None: causal"""
    if len(lengths) < 2:
        return None
    at, size = n, n + sum(lengths)
    mask = np.tri(size, dtype=bool)
    for m in lengths:
        mask[at + m :, at : at + m] = False
        at += m
    return torch.from_numpy(mask)


def pack(rows, dtype):
    """[`Branched`] -> `Packed`"""
    size = sum(map(len, rows))
    ids, positions, masks, slot_at, chunks = [], [], [], [], []
    labels, weight = np.full(size, IGNORE), np.zeros(size, np.float32)
    branch, number, begin = np.full(size, -1), 0, 0
    for row in rows:
        n = len(row.context)
        ids += row.context
        positions += range(n)
        slot_at += [begin + at for at, _ in row.slots]
        chunks += [chunk for _, chunk in row.slots]
        for first, end in row.learnt:
            labels[begin + first - 1 : begin + end - 1], weight[begin + first - 1 : begin + end - 1] = row.context[first:end], 1.0
        lengths, at = [], n
        for question, answer in row.branches:
            m = len(question) + len(answer)
            ids += question + answer
            positions += range(n, n + m)
            taught = slice(begin + at + len(question) - 1, begin + at + m - 1)
            labels[taught], weight[taught], branch[taught] = answer, len(answer) ** -0.5, number
            at, number = at + m, number + 1
            lengths.append(m)
        masks.append(visible(n, lengths))
        begin += at
    of_row = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    arrays = (torch.from_numpy(a) for a in (np.array(ids), labels, weight, branch, of_row, np.array(slot_at, np.int64)))
    return Packed(*arrays, chunks, Rows(map(len, rows), dtype, torch.tensor(positions), masks))
