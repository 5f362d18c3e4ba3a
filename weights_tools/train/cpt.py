"""Stage 3: continual pre-training. All parts learn to predict the next paragraph from the chunks of the one before.

Steps are of several kinds, so that nothing learnt before decays:
  compressed   <s>, n slots, then the following text (targets)
  mixed        the same with a random share of the chunks left as tokens (stage 3b); those tokens are targets too
  rebuild      <s>, few slots, </s>, their text (targets): stage 2 goes on; the </s> says that this is not the next paragraph
  recall       <s>, n slots, then of some chunks in random order </s>, a few tokens of it, and those that follow in it (targets): a slot
               must be found by what is in it, as for a question; our addition too
  plain        <s> and text, all targets: the full context, and near its start no context
  questions    passages and questions as tokens; answers are targets

With [data] teacher the targets of compressed and mixed rows are mostly what the decoder itself says of the next token after the
same text as tokens (our addition; the paper trains on the tokens alone). What a context adds to a prediction is some tenths of a nat, the
surprise of one token is several: against the sampled token a small model would need far more text to learn to read its slots.

    python -m weights_tools.train.cpt configs/nano/cpt.toml
"""
import sys

import numpy as np

from . import reconstruct
from .common import parts_of, train
from .curriculum import draw
from .loaders import Made
from .model import MixedBatch, n_expand
from .stage import begin, open_questions, open_text

SHAPES = 2**31  # beside the generators of parts, [seed, step, part]


def mixed_pieces(batch, chunks, expanded, kind="tokens"):
    """A chunk's tokens if it is expanded, else its slot."""
    return [(kind, c) if i in expanded else ("slot", batch.chunk(c)) for i, c in enumerate(chunks)]


def next_paragraph_row(batch, model, text, rng, n_chunks, k, n_target, p, teacher=None):
    """teacher: {context = tokens that it reads, weight}"""
    ids = text.window(rng, n_chunks * k + n_target)
    chunks = model.cut(ids[: n_chunks * k], k)
    expanded = set(rng.permutation(n_chunks)[: n_expand(p, n_chunks)].tolist())
    batch.add_row([("tokens", [model.bos]), *mixed_pieces(batch, chunks, expanded, "target"), ("target", ids[n_chunks * k :])])
    if teacher:
        batch.teach([model.bos, *ids[max(0, n_chunks * k - teacher["context"]) :]], n_target, teacher["weight"])


def recall_row(batch, model, text, rng, n_chunks, k, n_recalled, key=2):
    """`key` tokens from a random place of each of n_recalled chunks of k tokens, and the chunk's other tokens after them."""
    ids = text.window(rng, n_chunks * k)
    chunks = model.cut(ids, k)
    pieces = [("tokens", [model.bos]), *mixed_pieces(batch, chunks, set())]
    for i in rng.permutation(n_chunks)[:n_recalled]:
        begin = int(rng.integers(0, k - key))
        pieces += [("tokens", [model.eos, *chunks[i][begin : begin + key]]), ("target", chunks[i][begin + key :])]
    batch.add_row(pieces)


def shape_rng(cfg, number):
    """Generator of what decides how long part `number` takes, the same for all parts of a step: processes wait for each other."""
    return np.random.default_rng([cfg["run"]["seed"], SHAPES, number // parts_of(cfg["run"])])


def text_step(batch, model, data, text, rng, shape, fraction):
    """Rows of one kind (compressed, mixed, rebuild or recall), one k and one number of chunks, drawn from `shape`. Returns the kind's name."""
    k = int(shape.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
    sizes = [n for n in data["n_chunks"] if n * k <= data["max_context"]]
    n_chunks = draw(shape, sizes, fraction, data.get("curriculum", True))
    shares, targets = data["shares"], np.atleast_1d(data["target"])
    kinds = [name for name in ("compressed", "mixed", "rebuild", "recall") if name in shares]
    total = sum(shares[name] for name in kinds)
    kind = kinds[shape.choice(len(kinds), p=[shares[name] / total for name in kinds])]
    target = int(shape.choice(targets))
    if kind == "rebuild":
        n = max(1, min(n_chunks, data.get("rebuilt", target) // k))
        reconstruct.add_rows(batch, model, text, rng, max(1, data["positions"] // (n * (k + 1))), n, k, mark=[model.eos])
        return f"rebuild k{k}"
    if kind == "recall":
        n_recalled = min(n_chunks, max(1, data.get("rebuilt", target) // k))
        for _ in range(max(1, data["positions"] // (n_chunks + n_recalled * (k + 1)))):
            recall_row(batch, model, text, rng, n_chunks, k, n_recalled)
        return f"recall k{k}"
    p = float(shape.uniform(*data["mixed_p"])) if kind == "mixed" else 0.0
    length = n_chunks + n_expand(p, n_chunks) * (k - 1) + target
    for _ in range(max(1, data["positions"] // length)):
        next_paragraph_row(batch, model, text, rng, n_chunks, k, target, p, data.get("teacher"))
    return f"{kind} k{k}"


def token_step(batch, model, data, text, qa, rng, shape):
    shares, length = data["shares"], int(shape.choice(data["lengths"]))
    questions = shape.random() * (shares["plain"] + shares["questions"]) >= shares["plain"]
    for _ in range(max(1, data["positions"] // length)):
        if questions:
            ids, is_answer = qa.row(rng, length, data.get("others", 0))
            batch.add_row([("target" if a else "tokens", [i]) for i, a in zip(ids, is_answer)])
        else:
            batch.add_row([("tokens", [model.bos]), ("target", text.window(rng, length - 1))])
    return "questions" if questions else "plain"


def named_loss(model):
    """The loss of (name, batch), shown under that name."""

    def loss(made):
        name, batch = made
        value = batch.loss(model)
        return value, batch.positions(), {name: value.detach()}

    return loss


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    if cfg["run"].get("start_encoder"):
        model.start_encoder_from_decoder()
    text, shares = open_text(cfg, world), data["shares"]
    qa = open_questions(cfg, model) if shares.get("questions") else None

    def make(rng, fraction, number):
        batch, shape = MixedBatch(), shape_rng(cfg, number)
        if shape.random() * sum(shares.values()) < shares["plain"] + shares["questions"]:
            name = token_step(batch, model, data, text, qa, rng, shape)
        else:
            name = text_step(batch, model, data, text, rng, shape, fraction)
        return name, batch.finished(multiple=32)

    train(cfg, model, Made(make, named_loss(model)), {"decoder", "encoder", "projector"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
