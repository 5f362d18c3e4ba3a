"""Stage 0: the reader. The adapter learns to answer questions with every passage as tokens; answers are the targets.

    python -m weights_tools.train.smol.reader weights_tools/train/configs/smol/reader.toml
"""
import sys
from pathlib import Path

import numpy as np
import torch

from ..common import parts_of, train
from .model import begin
from .questions import Asker, Template, draw_part, held_out
from .rows import pack

SHAPES = 2**31  # beside the generators of parts


def part_loss(model, rows):
    """(mean loss of the answers' tokens, each answer weighted by the root of its length; nll [targets])"""
    return model.loss(pack(rows, model.decoder.dtype))


@torch.no_grad()
def measure(model, rows, positions=2048):
    """{"answer nats a token", "exact": share of the answers of which every token, the end included, is the likeliest}: greedy decoding would give
    these word for word."""
    nats, n, right, answers, begin = 0.0, 0, 0, 0, 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and len(rows[end]) * (end + 1 - begin) <= positions:
            end += 1
        batch = pack(rows[begin:end], model.decoder.dtype)
        taught = batch.taught()
        labels, branch = batch.labels[taught], batch.branch[taught]
        logits = model.decoder.logits(model.hidden(batch)[taught]).float()
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        n += len(labels)
        wrong = torch.zeros(int(branch.max()) + 1).index_add_(0, branch, (logits.argmax(1) != labels).float())
        right, answers, begin = right + int((wrong == 0).sum()), answers + len(wrong), end
    return {"nats": nats / n, "exact": right / answers, "answers": answers}


def main(config):
    cfg, world, model = begin(config)
    data, folder = cfg["data"], Path(cfg["data"]["folder"])
    template = Template(folder / "tokenizer.json", cfg["template"], model.end)
    asker = Asker(folder, data["tasks"], data["sizes"], data["unanswerable"], data["others"])
    watched = held_out(folder / "validation/squad.jsonl", template, 40)

    def loss_of(rng, fraction, number):
        shape = np.random.default_rng([cfg["run"]["seed"], SHAPES, number // parts_of(cfg["run"])])
        rows = draw_part(asker, template, rng, data, shape.random())
        loss, nll = part_loss(model, rows)
        return loss, sum(map(len, rows)), {"answers": loss.detach(), "rows": float(len(rows)), "questions": float(sum(len(r.branches) for r in rows))}

    train(cfg, model, loss_of, {"decoder"}, world, lambda: measure(model, watched))


if __name__ == "__main__":
    main(sys.argv[1])
