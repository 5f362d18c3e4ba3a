"""Stage 4: supervised fine-tuning on questions over passages, for every degree of expansion.

A row is <s>, the passages as chunks (slots or tokens), then a few questions about one of them, each with its answer and
</s>; answers are the targets. The expanded share is none, all, or anything between; a chunk that holds part of an answer is
expanded with raised probability, so that the decoder learns to look for it there. Text rows of stage 3 keep language and
next-paragraph prediction alive.

    python -m weights_tools.train.sft configs/nano/sft.toml
"""
import sys

import torch

from .batches import Qa, Segments, Squad, Text
from .common import load_model, read_config, train
from .cpt import add_text_rows, add_token_rows, mixed_pieces
from .facts import FactMaker
from .model import BOS, MixedBatch, n_expand
from .reconstruct import chunked


class Task:
    """One set of passages, tokenised and chunked, and the questions asked about it.

    chunks: id lists in input order; passage_of[i]: the passage of chunk i; qas: [(question text, question ids, answer ids, holders)],
    holders being the chunks that hold part of the answer's first occurrence in the right passage."""

    def __init__(self, qa, passages, gold, qas, k):
        self.chunks, self.passage_of, self.gold = [], [], gold
        starts, text_of_gold = None, None
        for n, p in enumerate(passages):
            ids = qa.segments.passage(p)
            if n == gold:
                text_of_gold = f"{p['title']}\n{p['text']}" if p.get("title") else p["text"]
                encoding = qa.segments.tokenizer.encode(text_of_gold, add_special_tokens=False)
                starts, first = encoding.offsets, len(self.chunks)
            pieces = chunked(ids, k)
            self.chunks += pieces
            self.passage_of += [n] * len(pieces)
        self.qas = []
        body = text_of_gold.find("\n") + 1 if passages[gold].get("title") else 0
        for question, answer in qas:
            begin = text_of_gold.find(answer, body)
            end = begin + len(answer)
            holders = {first + t // k for t, (a, b) in enumerate(starts) if a < end and b > begin} if begin >= 0 else set()
            self.qas.append((question, qa.question(question), qa.answer(answer), sorted(holders)))

    def context(self, batch, expanded, suffix):
        """The pieces of <s> and the passages; a chunk's suffix tokens follow the last chunk of its passage."""
        pieces = [("tokens", [BOS])]
        mixed = mixed_pieces(batch, self.chunks, expanded)
        for i, piece in enumerate(mixed):
            pieces.append(piece)
            if i + 1 == len(mixed) or self.passage_of[i + 1] != self.passage_of[i]:
                pieces.append(("tokens", suffix))
        return pieces


def draw_task(data, rng, qa, k, max_tokens):
    """A task that fits into max_tokens of context."""
    while True:
        if rng.random() < data["squad_share"]:
            source, n = qa.squad, int(rng.integers(1, data["max_squad_passages"] + 1))
        else:
            source, n = qa.maker, int(rng.integers(1, data["max_passages"] + 1))
        passages, gold, qas = source.task(rng, n)
        task = Task(qa, passages, gold, [qas[i] for i in rng.permutation(len(qas))[: data["questions"]]], k)
        if sum(map(len, task.chunks)) <= max_tokens:
            return task


def choose_expanded(data, rng, task):
    n = len(task.chunks)
    u = rng.random()
    if u < data["none"]:
        return set()
    if u < data["none"] + data["all"]:
        return set(range(n))
    expanded = set(rng.permutation(n)[: n_expand(float(rng.uniform(0.05, 0.5)), n)].tolist())
    for _, _, _, holders in task.qas:
        if rng.random() < data["holder"]:
            expanded |= set(holders)
    return expanded


def add_question_row(batch, data, rng, qa, k):
    task = draw_task(data, rng, qa, k, data["max_context"])
    pieces = task.context(batch, choose_expanded(data, rng, task), qa.suffix)
    for _, question, answer, _ in task.qas:
        pieces += [("tokens", question), ("target", answer)]
    batch.add_row(pieces)


def main(config):
    cfg = read_config(config)
    run, data = cfg["run"], cfg["data"]
    torch.manual_seed(run["seed"])
    model = load_model(cfg, run["init"])
    text = Text(data["folder"], data["weights"])
    qa = Qa(Segments(data["folder"] + "/tokenizer.json"), cfg["template"], FactMaker("train"), Squad(data["folder"] + "/squad_train.json"))

    def loss_of(rng, fraction):
        batch, u = MixedBatch(), rng.random()
        if u < data["text_steps"]:
            name = "text"
            add_text_rows(batch, data, text, rng, 1.0, data["rows"])
        elif u < data["text_steps"] + data["token_steps"]:
            name = "tokens"
            add_token_rows(batch, data, text, qa, rng, data["length"], max(1, data["rows"] * 256 // data["length"]))
        else:
            name = "answers"
            k = int(rng.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
            for _ in range(data["question_rows"]):
                add_question_row(batch, data, rng, qa, k)
        loss = batch.loss(model)
        return loss, sum(len(ids) for ids, _, _ in batch.rows), {name: loss.item()}

    train(cfg, model, loss_of, {"decoder", "encoder", "projector"})


if __name__ == "__main__":
    main(sys.argv[1])
