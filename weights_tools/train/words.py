"""Where a policy that compares chunks with a question begins (our own addition to the paper's).

A chunk embedding is made to give the chunk's tokens back in order, so the encoder may put the same word into a different direction
at every position; a policy begun at random then sees no likeness between a question and the chunk that answers it, and its loss
stays where even trial is. So its input projection begins as the linear map that best gives a chunk's bag of words, and its first
layer's keys as its queries, so that a chunk looks at its likes."""
import numpy as np
import torch


def inverse_frequency(bags, vocab_size):
    """[V] log of chunks per chunk that has the word, for words in the bags (sets of ids); zero for the others."""
    found = torch.zeros(vocab_size)
    for bag in bags:
        found[list(bag)] += 1
    return torch.where(found > 0, torch.log(len(bags) / found.clamp_min(1)), torch.zeros_like(found))


def fit_words(x, bags, vocab_size, dim, generator, ridge=1e-3):
    """(weight [dim, d_enc], bias [dim]): ridge regression from chunk embeddings x [N, d_enc] to their bags (sets of ids), a bag being
    the sum of its words' random vectors times their inverse frequency, scaled so that the fit's outputs have variance 1."""
    vectors = torch.randn(vocab_size, dim, generator=generator) * inverse_frequency(bags, vocab_size)[:, None]
    y = torch.stack([vectors[list(bag)].sum(0) / len(bag) ** 0.5 for bag in bags]).double()
    x = x.double()
    centre = x.mean(0)
    a = x - centre
    damped = a.T @ a + ridge * a.square().sum() / a.shape[1] * torch.eye(a.shape[1], dtype=a.dtype)
    weight = torch.linalg.solve(damped, a.T @ (y - y.mean(0))).T
    weight = weight / (a @ weight.T).std()
    return weight.float(), -(weight @ centre).float()


def begin_with_words(model, chunks, seed):
    """Sets the policy's input projection and first keys from different chunks (ids), hundreds of them or more; the same in every
    process that is given the same."""
    with torch.no_grad():
        x = torch.cat([model.encode(chunks[at : at + 256]).float().cpu() for at in range(0, len(chunks), 256)])
        bags = [set(np.asarray(c if getattr(c, "encoder", None) is None else c.encoder).tolist()) for c in chunks]
        into, first = model.policy.in_proj, model.policy.layers[0]
        weight, bias = fit_words(x, bags, model.encoder.config.vocab_size, into.out_features, torch.Generator().manual_seed(seed))
        into.weight.copy_(weight)
        into.bias.copy_(bias)
        first.k.weight.copy_(first.q.weight)
