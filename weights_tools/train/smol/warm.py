"""Stage 1: encoder and projector begin without the decoder. A slot is to tell its chunk's k tokens, all at once: what the slot adds to the neutral token
goes through one small map for each place in the chunk and meets the decoder's embeddings. Softmax over the batch's own tokens and some at random.

The maps read directions alone; the slots' size is settled where the decoder first reads them (reconstruct.py).

    python -m weights_tools.train.smol.warm weights_tools/train/configs/smol/warm.toml
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..common import train
from .model import begin
from .texts import held_out_windows, open_text


class Maps(nn.Module):
    """[k, dim, dim] and a bias for each place of a chunk."""

    def __init__(self, k, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, dim, dim) * 0.3 / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(k, 1, dim))

    def forward(self, x, k):
        """x [N, dim] -> [k, N, dim]"""
        return torch.matmul(x, self.weight[:k]) + self.bias[:k]


def predicted(model, chunks):
    """[k, N, dim], to be compared with the decoder's embeddings. Chunks of one length k."""
    slots = model.slots(chunks)
    added = F.rms_norm(slots - model.projector.fc2.bias, slots.shape[-1:])
    with torch.autocast("cpu", torch.bfloat16, enabled=model.decoder.dtype == torch.bfloat16):
        return model.maps(added, len(chunks[0])).float()


def sampled(targets, vocabulary, n_random, rng):
    """(candidates [C], their log weights [C], targets' places there): the different targets, and others at random that stand for all the rest."""
    own, where = np.unique(targets, return_inverse=True)
    others = np.setdiff1d(rng.integers(0, vocabulary, n_random), own)
    weight = np.zeros(len(own) + len(others), np.float32)
    if len(others):
        weight[len(own) :] = np.log((vocabulary - len(own)) / len(others))
    return np.concatenate([own, others]), weight, where


def warm_loss(model, chunks, n_random, rng):
    """(mean loss, share of tokens whose likeliest candidate is right)"""
    targets = np.array(chunks).T.reshape(-1)  # as `predicted` orders them
    candidates, weight, where = sampled(targets, model.decoder.embed.shape[0], n_random, rng)
    table = model.decoder.embed[torch.from_numpy(candidates)]
    h = predicted(model, chunks).flatten(0, 1).to(table.dtype)
    logits = (h @ table.T).float() + torch.from_numpy(weight)
    where = torch.from_numpy(where)
    return F.cross_entropy(logits, where), (logits.argmax(1) == where).float().mean()


def main(config):
    cfg, world, model = begin(config, ("encoder",))
    data, text = cfg["data"], open_text(cfg)
    model.maps = Maps(max(data["chunk_lens"]), model.decoder.embed.shape[1])
    watched = {k: [c.tolist() for w in held_out_windows(cfg, 16, 16 * k) for c in np.split(w, 16)] for k in data["chunk_lens"]}

    def loss_of(rng, fraction, number):
        k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
        chunks = []
        while len(chunks) * k < data["tokens"]:
            chunks += [c.tolist() for c in np.split(text.window(rng, 32 * k), 32)]
        loss, right = warm_loss(model, chunks, data["random"], rng)
        return loss, len(chunks) * k, {f"k{k}": loss.detach(), f"right k{k}": right}

    def measure():
        out = {}
        for k, chunks in watched.items():
            h = predicted(model, chunks).flatten(0, 1).to(model.decoder.embed.dtype)
            targets = torch.tensor(np.array(chunks).T.reshape(-1))
            logits = (h @ model.decoder.embed.T).float()
            out[f"nats k{k}"], out[f"right k{k}"] = F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).float().mean().item()
        return out

    train(cfg, model, loss_of, {"encoder", "projector", "maps"}, world, measure)


if __name__ == "__main__":
    main(sys.argv[1])
