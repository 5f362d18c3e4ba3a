"""Stage 3: continual pre-training. All parts learn to predict the next paragraph from the chunks of the one before.

Rows of one batch are of several kinds, so that nothing learnt before decays:
  compressed   <s>, n slots, then the following text (targets)
  mixed        the same with a random share of the chunks left as tokens (stage 3b); those tokens are targets too
  rebuild      <s>, few slots, their text (targets): stage 2 goes on
  plain        <s> and text, all targets: the full context, and near its start no context
  look_ups     generated passages and questions as tokens; answers are targets

    python -m weights_tools.train.cpt configs/nano/cpt.toml
"""
import sys

import torch

from .batches import Qa, Segments, Text
from .common import load_model, read_config, train
from .facts import FactMaker
from .model import BOS, MixedBatch, n_expand
from .reconstruct import chunked, curriculum, reconstruction_rows


def mixed_pieces(batch, chunks, expanded, kind="tokens"):
    """A chunk's tokens if it is expanded, else its slot."""
    return [(kind, c) if i in expanded else ("slot", batch.chunk(c)) for i, c in enumerate(chunks)]


def next_paragraph_row(batch, text, rng, n_chunks, k, n_target, p):
    ids = text.window(rng, n_chunks * k + n_target)
    chunks = chunked(ids[: n_chunks * k], k)
    expanded = set(rng.permutation(n_chunks)[: n_expand(p, n_chunks)].tolist())
    batch.add_row([("tokens", [BOS]), *mixed_pieces(batch, chunks, expanded, "target"), ("target", ids[n_chunks * k :])])


def add_text_rows(batch, data, text, rng, fraction, n_rows):
    """n_rows rows of compressed, mixed and rebuild kinds with one k and one number of chunks. Returns k and that number."""
    k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
    sizes = [n for n in data["n_chunks"] if n * k <= data["max_context"]]
    n_chunks = int(rng.choice(sizes, p=curriculum(sizes, fraction)))
    shares = data["shares"]
    for _ in range(n_rows):
        u = rng.random() * (shares["compressed"] + shares["mixed"] + shares["rebuild"])
        if u < shares["compressed"]:
            next_paragraph_row(batch, text, rng, n_chunks, k, data["target"], 0)
        elif u < shares["compressed"] + shares["mixed"]:
            next_paragraph_row(batch, text, rng, n_chunks, k, data["target"] // 2, float(rng.uniform(0.05, 0.5)))
        else:
            reconstruction_rows(batch, text, rng, 1, min(n_chunks, data["target"] // k), k)
    return k, n_chunks


def add_token_rows(batch, data, text, qa, rng, length, n_rows):
    for _ in range(n_rows):
        shares = data["shares"]
        if rng.random() * (shares["plain"] + shares["look_ups"]) < shares["plain"]:
            batch.add_row([("tokens", [BOS]), ("target", text.window(rng, length))])
        else:
            ids, is_answer = qa.look_up_row(rng, length)
            batch.add_row([("target" if a else "tokens", [i]) for i, a in zip(ids, is_answer)])


def main(config):
    cfg = read_config(config)
    run, data = cfg["run"], cfg["data"]
    torch.manual_seed(run["seed"])
    model = load_model(cfg, run["init"])
    text = Text(data["folder"], data["weights"])
    qa = Qa(Segments(data["folder"] + "/tokenizer.json"), cfg["template"], FactMaker("train"))

    def loss_of(rng, fraction):
        # Rows of one forward should be about equally long: most steps are compressed, the others tokens only.
        batch, shares = MixedBatch(), data["shares"]
        if rng.random() * sum(shares.values()) < shares["plain"] + shares["look_ups"]:
            add_token_rows(batch, data, text, qa, rng, data["length"], max(1, data["rows"] * 256 // data["length"]))
            name = "tokens"
        else:
            k, n = add_text_rows(batch, data, text, rng, fraction, data["rows"])
            name = f"k{k}"
        loss = batch.loss(model)
        return loss, sum(len(ids) for ids, _, _ in batch.rows), {name: loss.item()}

    train(cfg, model, loss_of, {"decoder", "encoder", "projector"})


if __name__ == "__main__":
    main(sys.argv[1])
