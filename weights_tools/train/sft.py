"""Stage 4: supervised fine-tuning on questions over passages, for every degree of expansion.

A row is <s>, the passages as chunks (slots or tokens), then questions about one passage after another, each with its answer and
</s>: a conversation on the passages, whose later questions follow from the earlier ones. Answers are the targets. The
expanded share is none, all, or anything between; a chunk that holds part of an answer is expanded with raised probability, so
that the decoder learns to look for it there. Text rows of stage 3 keep language and next-paragraph prediction alive. With [data]
imitation = WEIGHT the policy learns beside, by imitation and in some rows of a part, which chunks hold an answer, and the encoder learns
from it to say what can be found by a question (our addition): a frozen one that has learnt to spell out its chunks places the same word
differently at each of their positions.

    python -m weights_tools.train.sft configs/nano/sft.toml
"""
import sys

import numpy as np

from .common import train
from .cpt import mixed_pieces, named_loss, shape_rng, text_step, token_step
from .imitation import imitation
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


def to_imitate(qa, task, n):
    """[(chunks, question ids, holders)] of at most n of a task's questions, for imitation.py: the first on each passage, since a later one may
    say "it", of those that have holders."""
    out, before = [], None
    for question, _, _, holders in task.qas:
        passage = task.passage_of[holders[0]] if holders else None
        if holders and passage != before:
            out.append((task.chunks, qa.segments(question), holders))
        before = passage
    return out[:n]


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


def draw_rows(data, rng, qa, cut, k, place):
    """[(Task, its expanded chunks)] of a part of a step. Rows are padded to the longest of them, so rows are drawn for `pool` parts and
    neighbours in length taken, around one of them, as many as fit. That is the row at `place`, 0 .. 1, of all their positions in order of
    length: of long rows fewer fit."""
    pool, drawn = [], 0
    while drawn < data.get("pool", 4) * data["positions"]:
        _, task = draw_task(data, rng, qa, cut, k, data["max_context"])
        expanded = choose_expanded(data, rng, task)
        pool.append((task.length(expanded, qa.suffix), task, expanded))
        drawn += pool[-1][0]
    pool.sort(key=lambda row: row[0])
    lengths = np.array([length for length, _, _ in pool])
    begin = int(np.searchsorted(np.cumsum(lengths), min(place * lengths.sum(), lengths.sum() - 1), side="right"))
    end = begin + 1
    while end - begin < len(pool):
        downwards = begin > 0 and (end == len(pool) or rng.random() < 0.5)
        if lengths[end - 1 if downwards else end] * (end - begin + 1) > data["positions"]:
            break
        begin, end = (begin - 1, end) if downwards else (begin, end + 1)
    return [(task, expanded) for _, task, expanded in pool[begin:end]]


def add_question_rows(batch, model, data, rng, qa, k, place):
    """`place`: of draw_rows, the same for all parts of a step, which then take about as long as each other. An answer counts as the root of
    its length, or a few long ones, of which little can be learnt, would drown the many short ones."""
    weights, rows = [], draw_rows(data, rng, qa, model.cut, k, place)
    for task, expanded in rows:
        pieces = task.context(batch, expanded, model.bos, qa.suffix)
        for _, question, answer, _ in task.qas:
            pieces += [("tokens", question), ("target", answer)]
            weights += [len(answer) ** -0.5] * len(answer)
        batch.add_row(pieces)
    batch.weights = weights
    if data.get("imitation"):
        some = [rows[i][0] for i in rng.permutation(len(rows))[: data["imitation_rows"]]]
        batch.imitated = k, [asked for task in some for asked in to_imitate(qa, task, data["imitation_questions"])]


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    text, qa = open_text(cfg, world), open_questions(cfg, model)
    weight, answering = data.get("imitation", 0.0), named_loss(model)
    assert not weight or cfg["run"].get("sharding", "none") == "none", "[data] imitation: expected none with sharding, where all processes must use the policy alike"

    def loss_of(made):
        loss, n_positions, figures = answering(made)
        k, tasks = made[1].imitated or (0, [])
        if not tasks:
            return loss, n_positions, figures
        found, more = imitation(model, tasks, k, encoder_learns=True)
        return loss + weight * found, n_positions, figures | more

    def make(rng, fraction, number):
        batch, shape = MixedBatch(), shape_rng(cfg, number)
        u = shape.random()
        if u < data["text_steps"]:
            name = text_step(batch, model, data, text, rng, shape, 1.0)  # stage 3's curriculum is over
        elif u < data["text_steps"] + data["token_steps"]:
            name = token_step(batch, model, data, text, qa, rng, shape)
        else:
            name, k = "answers", int(shape.choice(data["chunk_lens"], p=data["chunk_len_weights"]))
            add_question_rows(batch, model, data, rng, qa, k, shape.random())
        return name, batch.finished(multiple=32)

    train(cfg, model, Made(make, loss_of), {"decoder", "encoder", "projector"} | ({"policy"} if weight else set()), world)


if __name__ == "__main__":
    main(sys.argv[1])
