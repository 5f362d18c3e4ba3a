"""Stage 2: encoder and projector learn to make chunks from which the frozen decoder can write the text back.

A row is <s>, the slots of n chunks, then the same text as tokens, which are the targets. The decoder has met copies in
pre-training, so it knows what the second half is about. The curriculum goes from one chunk to many: the share of each
task moves geometrically from the easy ones to the hard ones (paper, A.1).

    python -m weights_tools.train.reconstruct configs/nano/reconstruct.toml
"""
import sys

import numpy as np
import torch

from .batches import Text
from .common import load_model, read_config, train
from .model import BOS, MixedBatch


def curriculum(sizes, fraction, start_ratio=0.4, end_ratio=1.6):
    """Probabilities of the task sizes (easy to hard): geometric, its ratio moving geometrically from falling to rising."""
    ratio = start_ratio ** (1 - fraction) * end_ratio**fraction
    p = ratio ** np.arange(len(sizes), dtype=float)
    return p / p.sum()


def chunked(ids, k):
    """ids cut into pieces of k, the last one shorter."""
    return [ids[i : i + k] for i in range(0, len(ids), k)]


def reconstruction_rows(batch, text, rng, n_rows, n_chunks, k):
    for _ in range(n_rows):
        ids = text.window(rng, n_chunks * k)
        slots = [("slot", batch.chunk(c)) for c in chunked(ids, k)]
        batch.add_row([("tokens", [BOS]), *slots, ("target", ids)])


def main(config):
    cfg = read_config(config)
    run, data = cfg["run"], cfg["data"]
    torch.manual_seed(run["seed"])
    model = load_model(cfg, run["init"])
    if not run.get("keep_encoder"):
        model.start_encoder_from_decoder()
    text = Text(data["folder"], data["weights"])

    def loss_of(rng, fraction):
        k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
        n_chunks = int(rng.choice(data["n_chunks"], p=curriculum(data["n_chunks"], fraction)))
        batch = MixedBatch()
        reconstruction_rows(batch, text, rng, max(1, data["tokens"] // (n_chunks * (k + 1))), n_chunks, k)
        loss = batch.loss(model)
        return loss, sum(len(ids) for ids, _, _ in batch.rows), {"all": loss.item(), f"k{k}x{n_chunks}": loss.item()}

    train(cfg, model, loss_of, {"encoder", "projector"})


if __name__ == "__main__":
    main(sys.argv[1])
