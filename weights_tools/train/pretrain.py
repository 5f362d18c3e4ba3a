"""Stage 1: the decoder alone on tokens. Rows are windows of plain text, generated look-ups and copies.

The look-ups and copies (a span, then the span again) are what teaches a decoder this small to fetch from its context at
all; on plain text alone that skill takes far more tokens than a CPU can read in an hour.

    python -m weights_tools.train.pretrain configs/nano/pretrain.toml
"""
import sys

import torch

from .batches import Qa, Segments, Text
from .common import load_model, read_config, train
from .facts import FactMaker
from .model import BOS, IGNORE


def copy_row(text, rng, length):
    """<s> span span <s> span span ..., exactly `length` ids; second halves are marked."""
    ids, marked = [], []
    while len(ids) < length:
        span = text.window(rng, int(2 ** rng.uniform(3, 6.5))).tolist()
        ids += [BOS] + span + span
        marked += [False] * (1 + len(span)) + [True] * len(span)
    return ids[:length], marked[:length]


def main(config):
    cfg = read_config(config)
    run, data = cfg["run"], cfg["data"]
    torch.manual_seed(run["seed"])
    model = load_model(cfg, run.get("init"))
    text = Text(data["folder"], data["weights"])
    qa = Qa(Segments(data["folder"] + "/tokenizer.json"), cfg["template"], FactMaker("train"))

    def loss_of(rng, fraction):
        # Short rows first: attention costs less and early learning is local. (from, rows, length) of the last phase begun.
        _, n_rows, length = [phase for phase in data["phases"] if phase[0] <= fraction][-1]
        rows, marks, kinds = [], [], []
        for _ in range(n_rows):
            u = rng.random()
            if u < data["copies"]:
                kind, (ids, marked) = 1, copy_row(text, rng, length + 1)
            elif u < data["copies"] + data["look_ups"]:
                kind, (ids, marked) = 2, qa.look_up_row(rng, length + 1)
            else:
                kind, ids = 0, [BOS] + text.window(rng, length).tolist()
                marked = [False] * len(ids)
            rows.append(ids)
            marks.append(marked)
            kinds.append(kind)
        ids, marked, kinds = torch.tensor(rows), torch.tensor(marks)[:, 1:], torch.tensor(kinds)
        inputs, labels = ids[:, :-1], ids[:, 1:].clone()
        # In copies only what can be known is learnt; generated passages are noise, their answers are not.
        labels[(kinds == 1)[:, None] & ~marked] = IGNORE
        row_kind = kinds[:, None].expand_as(labels)[labels != IGNORE]
        in_answer = marked[labels != IGNORE]
        # The unforeseeable words of generated passages weigh little, their answers more.
        weight = torch.where((row_kind == 2) & ~in_answer, 0.25, torch.where(row_kind == 2, 2.0, 1.0))
        loss, losses = model.loss(model.hidden(inputs), labels, weight)
        figures = {}
        for name, which in (("text", row_kind == 0), ("copy", row_kind == 1), ("answers", (row_kind == 2) & in_answer)):
            if which.any():
                figures[name] = float(losses[which].mean())
        return loss, inputs.numel(), figures

    train(cfg, model, loss_of, {"decoder"})


if __name__ == "__main__":
    main(sys.argv[1])
