"""Stage 2: encoder and projector learn to make slots from which the frozen decoder writes the text back.

A row is the template's beginning, the slots of n chunks, a mark, then the text as tokens, which are the targets. First most chunks are short; the number
of chunks follows the curriculum.

    python -m weights_tools.train.smol.reconstruct weights_tools/train/configs/smol/reconstruct.toml
"""
import sys

import numpy as np

from ..common import train
from ..curriculum import draw
from .model import begin, settle_projector
from .questions import Template
from .rows import Pieces, pack
from .texts import held_out_windows, open_text


def along(points, fraction):
    """Between the rows of `points`, which stand at equal distances over 0 .. 1: shares that change as a stage goes on."""
    points = np.array(points, dtype=float)
    at = fraction * (len(points) - 1)
    low = min(int(at), len(points) - 2)
    share = points[low] + (at - low) * (points[low + 1] - points[low])
    return share / share.sum()


def rebuilt_row(template, mark, ids, k):
    """The row of `ids` in chunks of k tokens."""
    row = Pieces(template.before)
    for i in range(0, len(ids), k):
        row.slot([int(t) for t in ids[i : i + k]])
    return row.tokens(mark).tokens(ids, learn=True).row()


def main(config):
    cfg, world, model = begin(config, ("encoder",))
    data, text = cfg["data"], open_text(cfg)
    template = Template(f"{data['folder']}/tokenizer.json", cfg["template"], model.end)
    mark = template.segments(data["mark"])
    if "slot_share" in data:  # a checkpoint of this stage replaces what is settled here
        windows = held_out_windows(cfg, 64, 8)
        settle_projector(model, [w.tolist() for w in windows], data["slot_share"])
    watched = {(k, n): [rebuilt_row(template, mark, w, k) for w in held_out_windows(cfg, max(4, 24 // n), n * k)] for k in data["chunk_lens"] for n in (1, 8)}

    def loss_of(rng, fraction, number):
        rows, size, shares = [], 0, along(data["chunk_len_shares"], fraction)
        while size < data["positions"]:
            k, n = int(rng.choice(data["chunk_lens"], p=shares)), draw(rng, data["n_chunks"], fraction, data["curriculum"])
            rows.append(rebuilt_row(template, mark, text.window(rng, n * k), k))
            size += len(rows[-1])
        loss, nll = model.loss(pack(rows, model.decoder.dtype))
        return loss, size, {"nats": loss.detach(), "rows": float(len(rows))}

    def measure():
        return {f"nats k{k}x{n}": model.loss(pack(rows, model.decoder.dtype))[1].mean().item() for (k, n), rows in watched.items()}

    train(cfg, model, loss_of, {"encoder", "projector"}, world, measure)


if __name__ == "__main__":
    main(sys.argv[1])
