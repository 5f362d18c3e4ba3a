"""Stage 3: continual pre-training. After a context in slots, some chunks of it left as tokens, the next tokens are predicted as the reader predicts them
after the same context as tokens: its whole distribution, and beside it the token.

One pass of the reader over a window serves several rows, each with the window's beginning, up to another place, as its context. With the decoder's
adapter among [run] trains, a share of the parts holds it where it is: text and questions as tokens alone, taught by the reader.

    python -m weights_tools.train.smol.cpt weights_tools/train/configs/smol/cpt.toml
"""
import sys

import numpy as np
import torch

from ..common import train
from ..curriculum import draw
from ..model import n_expand
from .model import begin, reader_of
from .questions import Asker, Template, draw_part
from .rows import Branched, Pieces, pack
from .texts import held_out_windows, open_text


def split_row(template, window, k, n_chunks, expanded, n_target):
    """(row: the window's first n_chunks in slots or, those of `expanded`, tokens, then n_target tokens; which of the window's ids are targets).
    Expanded tokens are targets too."""
    row, taught = Pieces(template.text), []
    for i in range(n_chunks):
        chunk = [int(t) for t in window[i * k : (i + 1) * k]]
        if i in expanded:
            row.tokens(chunk, learn=True)
            taught += range(i * k, (i + 1) * k)
        else:
            row.slot(chunk)
    row.tokens(window[n_chunks * k : n_chunks * k + n_target], learn=True)
    return row.row(), [*taught, *range(n_chunks * k, n_chunks * k + n_target)]


@torch.no_grad()
def read_as_tokens(model, reader, template, windows):
    """The reader's hidden states before each id of `windows` (ids): a list of [size, dim]."""
    batch = pack([Branched([*template.text, *(int(t) for t in w)]) for w in windows], model.decoder.dtype)
    hidden, out, begin = model.hidden(batch, reader), [], len(template.text) - 1
    for w in windows:
        out.append(hidden[begin : begin + len(w)])
        begin += len(template.text) + len(w)
    return out


def text_part(model, reader, template, text, rng, data, fraction):
    """(loss, positions of the student, {figure}) of one window's rows."""
    window = text.window(rng, data["window"])
    (said,) = read_as_tokens(model, reader, template, [window])
    rows, places, size = [], [], 0
    while size < data["positions"]:
        k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
        n = draw(rng, [n for n in data["n_chunks"] if n * k + data["target"] <= len(window)], fraction, data["curriculum"])
        p = float(rng.choice(data["p"], p=data["p_weights"]))
        expanded = set(rng.permutation(n)[: n_expand(p, n)].tolist())
        row, taught = split_row(template, window, k, n, expanded, data["target"])
        rows.append(row)
        places += taught
        size += len(row)
    teacher = said[places]
    loss, nll = model.loss(pack(rows, model.decoder.dtype), torch.full((len(places),), data["teacher"]), teacher)
    return loss, size, {"compressed": nll.mean(), "large": float(np.mean([len(r.slots) >= 16 for r in rows]))}


def held_part(model, reader, rows, teacher):
    """(loss, positions, nll [targets]) of rows without slots, taught by the reader on the same."""
    batch = pack(rows, model.decoder.dtype)
    with torch.no_grad():
        said = model.hidden(batch, reader)[batch.taught()]
    loss, nll = model.loss(batch, torch.full((len(said),), teacher), said)
    return loss, sum(map(len, rows)), nll


@torch.no_grad()
def shares(model, reader, template, windows, data, n_target=64):
    """Mean nll of the last n_target ids of each window without context, with all of it (by the reader), and with slots of each k; and the share of the
    gap that each recovers."""
    def nll(rows, decoder=None):
        batch = pack(rows, model.decoder.dtype)
        hidden = model.hidden(batch, decoder)[batch.taught()]
        return model.decoder.loss(hidden, batch.labels[batch.taught()], torch.ones(len(hidden)))[1].mean().item()

    def as_tokens(w, begin):
        return Pieces(template.text).tokens(w[begin:-n_target]).tokens(w[-n_target:], learn=True).row()

    none = nll([as_tokens(w, len(w) - n_target) for w in windows], reader)
    full = nll([as_tokens(w, 0) for w in windows], reader)
    out = {"none": none, "full": full}
    for k in data["chunk_lens"]:
        found = nll([split_row(template, w, k, (len(w) - n_target) // k, (), n_target)[0] for w in windows])
        out[f"k{k}"], out[f"share k{k}"] = found, (none - found) / max(none - full, 1e-6)
    if any(p.requires_grad for p in model.decoder.adapters.parameters()):
        out["own full"] = nll([as_tokens(w, 0) for w in windows])
    return out


def main(config):
    cfg, world, model = begin(config, ("encoder",))
    data, text, trains = cfg["data"], open_text(cfg), set(cfg["run"]["trains"])
    template = Template(f"{data['folder']}/tokenizer.json", cfg["template"], model.end)
    reader = reader_of(model, cfg["run"]["reader"])
    hold = data.get("hold", 0.0)
    asker = Asker(data["folder"], data["tasks"], data["sizes"], data["unanswerable"], data["others"]) if hold else None
    watched = held_out_windows(cfg, data["watched"], data["watched_context"] + 64)

    def loss_of(rng, fraction, number):
        if rng.random() >= hold:
            return text_part(model, reader, template, text, rng, data, fraction)
        if rng.random() < 0.5:
            rows, name = draw_part(asker, template, rng, data, rng.random()), "held questions"
        else:
            rows, name = [Pieces(template.text).tokens(text.window(rng, data["positions"] // 2), learn=True).row()], "held text"
        loss, size, nll = held_part(model, reader, rows, data["teacher"])
        return loss, size, {name: nll.mean()}

    train(cfg, model, loss_of, trains, world, lambda: shares(model, reader, template, watched, data))


if __name__ == "__main__":
    main(sys.argv[1])
