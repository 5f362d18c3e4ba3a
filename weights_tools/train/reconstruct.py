"""Stage 2: encoder and projector learn to make chunks from which the decoder can write the text back. The paper's decoder is frozen
here: `[run] freeze = ["decoder"]`. One too small to read chunks without learning it does better unfrozen.

A row is <s>, the slots of n chunks, then the same text as tokens, which are the targets. The decoder has met copies in
pre-training, so it knows what the second half is about. The curriculum goes from one chunk to many (curriculum.py).

    python -m weights_tools.train.reconstruct configs/nano/reconstruct.toml
"""
import sys

from .common import train
from .curriculum import draw
from .loaders import Made
from .model import MixedBatch
from .stage import begin, open_text


def add_rows(batch, model, text, rng, n_rows, n_chunks, k, mark=()):
    """mark: ids between the slots and the text"""
    for _ in range(n_rows):
        ids = text.window(rng, n_chunks * k)
        slots = [("slot", batch.chunk(c)) for c in model.cut(ids, k)]
        batch.add_row([("tokens", [model.bos]), *slots, ("tokens", mark), ("target", ids)])


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    if cfg["run"].get("start_encoder"):
        model.start_encoder_from_decoder()
    text = open_text(cfg, world)

    def make(rng, fraction, number):
        k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
        n_chunks = draw(rng, data["n_chunks"], fraction, data.get("curriculum", True))
        batch = MixedBatch()
        add_rows(batch, model, text, rng, max(1, data["positions"] // (n_chunks * (k + 1))), n_chunks, k)
        return f"k{k}x{n_chunks}", batch.finished(multiple=8)  # many rows are short

    def loss(made):
        name, batch = made
        value = batch.loss(model)
        return value, batch.positions(), {"all": value.detach(), name: value.detach()}

    train(cfg, model, Made(make, loss), {"encoder", "projector", "decoder"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
