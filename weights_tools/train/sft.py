"""Stage 4: supervised fine-tuning on questions over passages, for every degree of expansion.

A row is <s>, the passages as chunks (slots or tokens), then questions about one passage after another, each with its answer and
</s>: a conversation on the passages, whose later questions follow from the earlier ones. Answers are the targets. The
expanded share is none, all, or anything between; a chunk that holds part of an answer is expanded with raised probability, so
that the decoder learns to look for it there. Text rows of stage 3 keep language and next-paragraph prediction alive.

    python -m weights_tools.train.sft configs/nano/sft.toml
"""
import sys

import numpy as np

from .common import train
from .cpt import mixed_pieces, named_loss, shape_rng, text_step, token_step
from .loaders import Made
from .model import MixedBatch, n_expand
from .stage import begin, open_questions, open_text


class Task:
    """One set of passages, tokenised and cut into chunks, and the questions asked about them.

    asked: [(question, answer, index of the passage that answers, or None)].
    chunks: in input order; passage_of[i]: the passage of chunk i; qas: [(question text, question ids, answer ids, holders)],
    holders being the chunks that hold part of the answer's first occurrence in its passage (none where the answer is not in its words)."""

    def __init__(self, qa, passages, asked, cut, k):
        self.chunks, self.passage_of, texts = [], [], []
        answering = {gold for _, _, gold in asked}
        for n, p in enumerate(passages):
            if n in answering:
                text = f"{p['title']}\n{p['text']}" if p.get("title") else p["text"]
                encoding = qa.segments.tokenizer.encode(text, add_special_tokens=False)
                ids = encoding.ids
                texts.append((text, encoding.offsets, len(self.chunks)))
            else:
                ids = qa.segments.passage(p)
                texts.append(None)
            pieces = cut(ids, k)
            self.chunks += pieces
            self.passage_of += [n] * len(pieces)
        self.qas = []
        for question, answer, gold in asked:
            holders = set()
            if gold is not None:
                text, offsets, first = texts[gold]
                begin = text.find(answer, text.find("\n") + 1 if passages[gold].get("title") else 0)
                end = begin + len(answer)
                if begin >= 0:
                    holders = {first + t // k for t, (a, b) in enumerate(offsets) if a < end and b > begin}
            self.qas.append((question, qa.question(question), qa.answer(answer), sorted(holders)))

    def length(self, expanded, suffix):
        """Decoder positions of the row, questions and answers included."""
        context = sum(len(c) if i in expanded else 1 for i, c in enumerate(self.chunks)) + (self.passage_of[-1] + 1) * len(suffix)
        return 1 + context + sum(len(question) + len(answer) for _, question, answer, _ in self.qas)

    def context(self, batch, expanded, bos, suffix):
        """The pieces of <s> and the passages; a passage's suffix tokens follow its last chunk."""
        pieces = [("tokens", [bos])]
        mixed = mixed_pieces(batch, self.chunks, expanded)
        for i, piece in enumerate(mixed):
            pieces.append(piece)
            if i + 1 == len(mixed) or self.passage_of[i + 1] != self.passage_of[i]:
                pieces.append(("tokens", suffix))
        return pieces


def draw_task(data, rng, qa, cut, k, max_tokens, max_answer=96):
    """(source's name, Task): one that fits into max_tokens of context and has at least one question whose answer is not too long. Questions
    and answers together have at most `max_asked` tokens."""
    while True:
        name, passages, asked = qa.tasks.conversation(rng, data.get("others", 0))
        if sum(len(p["text"]) for p in passages) > 8 * max_tokens:
            continue
        task = Task(qa, passages, asked[: data["questions"]], cut, k)
        task.qas = [q for q in task.qas if len(q[2]) <= max_answer]
        asked = np.cumsum([len(question) + len(answer) for _, question, answer, _ in task.qas])
        task.qas = task.qas[: int(np.searchsorted(asked, data.get("max_asked", np.inf), side="right"))]
        if task.qas and sum(map(len, task.chunks)) <= max_tokens:
            return name, task


def choose_expanded(data, rng, task):
    n = len(task.chunks)
    u = rng.random()
    if u < data["none"]:
        return set()
    if u < data["none"] + data["all"]:
        return set(range(n))
    expanded = set(rng.permutation(n)[: n_expand(float(rng.uniform(*data["expanded_p"])), n)].tolist())
    for _, _, _, holders in task.qas:
        if rng.random() < data["holder"]:
            expanded |= set(holders)
    return expanded


def draw_rows(data, rng, qa, cut, k):
    """[(Task, its expanded chunks)] of a part of a step. Rows are padded to the longest of them, so rows are drawn for `pool` parts and
    neighbours in length taken, around one of them, as many as fit. A row's chance of being that one is its length's: of long rows fewer fit."""
    pool, drawn = [], 0
    while drawn < data.get("pool", 4) * data["positions"]:
        _, task = draw_task(data, rng, qa, cut, k, data["max_context"])
        expanded = choose_expanded(data, rng, task)
        pool.append((task.length(expanded, qa.suffix), task, expanded))
        drawn += pool[-1][0]
    pool.sort(key=lambda row: row[0])
    lengths = np.array([length for length, _, _ in pool])
    begin = int(rng.choice(len(pool), p=lengths / lengths.sum()))
    end = begin + 1
    while end - begin < len(pool):
        downwards = begin > 0 and (end == len(pool) or rng.random() < 0.5)
        if lengths[end - 1 if downwards else end] * (end - begin + 1) > data["positions"]:
            break
        begin, end = (begin - 1, end) if downwards else (begin, end + 1)
    return [(task, expanded) for _, task, expanded in pool[begin:end]]


def add_question_rows(batch, model, data, rng, qa, k):
    """An answer counts as the root of its length, or a few long ones, of which little can be learnt, would drown the many short ones."""
    weights = []
    for task, expanded in draw_rows(data, rng, qa, model.cut, k):
        pieces = task.context(batch, expanded, model.bos, qa.suffix)
        for _, question, answer, _ in task.qas:
            pieces += [("tokens", question), ("target", answer)]
            weights += [len(answer) ** -0.5] * len(answer)
        batch.add_row(pieces)
    batch.weights = weights


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    text, qa = open_text(cfg, world), open_questions(cfg, model)

    def make(rng, fraction, number):
        batch, shape = MixedBatch(), shape_rng(cfg, number)
        u = shape.random()
        if u < data["text_steps"]:
            name = text_step(batch, model, data, text, rng, shape, 1.0)  # stage 3's curriculum is over
        elif u < data["text_steps"] + data["token_steps"]:
            name = token_step(batch, model, data, text, qa, rng, shape)
        else:
            name, k = "answers", int(shape.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
            add_question_rows(batch, model, data, rng, qa, k)
        return name, batch.finished(multiple=32)

    train(cfg, model, Made(make, named_loss(model)), {"decoder", "encoder", "projector"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
