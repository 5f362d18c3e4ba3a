"""Stage 1: the decoder alone on tokens. Rows are windows of plain text, copies, and questions over passages.

The questions and copies (a span, then the span again) are what teaches a decoder this small to fetch from its context at
all; on plain text alone that skill takes far more tokens than there are.

    python -m weights_tools.train.pretrain configs/nano/pretrain.toml
"""
import sys

import numpy as np
import torch

from .common import train
from .loaders import Made
from .model import BOS, IGNORE
from .stage import begin, open_questions, open_text

TEXT, COPY, QUESTIONS = range(3)
N_SPECIAL = 4  # the first ids of prepare.py's tokenizer


def copy_row(text, rng, length, random=0.0, n_ids=0):
    """<s> span span <s> span span ..., exactly `length` ids; second halves are marked. A span is a window of the text or, this share of
    them, `random` ids of the vocabulary of n_ids, which nothing foretells but their copy."""
    ids, marked = [], []
    while len(ids) < length:
        n = int(2 ** rng.uniform(3, 6.5))
        span = (rng.integers(N_SPECIAL, n_ids, n) if random and rng.random() < random else text.window(rng, n)).tolist()
        ids += [BOS] + span + span
        marked += [False] * (1 + len(span)) + [True] * len(span)
    return ids[:length], marked[:length]


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    text, qa = open_text(cfg, world), open_questions(cfg, model)

    def make(rng, fraction, number):
        # Short rows first: attention costs less and early learning is local. [from, rows, length, copies, questions] of the last
        # phase begun.
        _, n_rows, length, copies, questions = [phase for phase in data["phases"] if phase[0] <= fraction][-1]
        rows, marks, kinds = [], [], []
        for i in range(n_rows):
            u = rng.random()
            if u < copies:
                kind, (ids, marked) = COPY, copy_row(text, rng, length + 1, data.get("random_copies", 0.0), cfg["decoder"]["vocab_size"])
            elif u < copies + questions:
                kind, (ids, marked) = QUESTIONS, qa.row(rng, length + 1, data.get("others", 0))
            else:
                kind, ids = TEXT, [BOS] + text.even(number * n_rows + i, length).tolist()
                marked = [False] * len(ids)
            rows.append(ids)
            marks.append(marked)
            kinds.append(kind)
        return np.array(rows, dtype=np.int64), np.array(marks), np.array(kinds)

    def loss(made):
        ids, marked, kinds = (torch.from_numpy(a).to(world.device) for a in made)
        inputs, labels, marked, kind = ids[:, :-1], ids[:, 1:].clone(), marked[:, 1:], kinds[:, None]
        # In copies only what can be known is learnt; passages beside questions are text that comes again and again.
        labels[(kind == COPY) & ~marked] = IGNORE
        weight = torch.where(marked & (kind == QUESTIONS), data["answer_weight"], torch.where(kind == QUESTIONS, data["passage_weight"], 1.0))
        value, nll = model.dense_loss(model.hidden(inputs), labels, weight)
        figures = {}
        for name, which in (("text", kind == TEXT), ("copy", kind == COPY), ("answers", (kind == QUESTIONS) & marked)):
            which = which & (labels != IGNORE)
            if which.any():
                figures[name] = nll[which].mean()
        return value, inputs.numel(), figures

    train(cfg, model, Made(make, loss), {"decoder"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
