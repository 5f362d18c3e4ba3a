"""Questions over passages as rows of the decoder: one context, then its questions as branches that do not see each other.

    <before> passages | question 1, answer 1 | question 2, answer 2 | ...

A branch sees the context and itself, and its positions go on where the context ends, so each is to the decoder what a row of its own would be,
while the context is read once for all of them.

Passages of SQuAD come with those that BM25 finds for their questions; beside questions that the passages answer there are some whose own
passage is absent. The other sources are those of tasks.py.

    python -m weights_tools.train.smol.questions --folder DATA     # writes DATA/tasks/squad-near.npy
"""
import argparse
from pathlib import Path

import numpy as np

from ..batches import Segments
from ..corpora import NO_ANSWER
from ..facts import FactMaker
from ..tasks import Tasks, in_random_order, read_jsonl
from .bm25 import Bm25
from .rows import Branched

N_NEAR = 24


def near_passages(passages, n=N_NEAR):
    """[len(passages), n] the passages that BM25 finds for each one's questions, best first, without itself."""
    index = Bm25([f"{p['title']}\n{p['text']}" for p in passages])
    out = np.zeros((len(passages), n), dtype=np.int32)
    for i, p in enumerate(passages):
        found = index.best(" ".join(q for q, _ in p["qas"]), n + 1)
        out[i] = found[found != i][:n]
    return out


class NearPassages:
    """SQuAD with BM25's distractors: `task` as the sources of tasks.py, with questions on every passage."""

    def __init__(self, path, near_path, max_chars=1500, max_answer_chars=80):
        self.all, self.near = read_jsonl(path), np.load(near_path)
        assert len(self.all) == len(self.near), f"{near_path}: expected {len(self.all)} rows, found {len(self.near)}; run questions.py again"
        for p in self.all:
            p["qas"] = [(q, a) for q, a in p["qas"] if len(a) <= max_answer_chars]
        self.asked = [i for i, p in enumerate(self.all) if p["qas"] and len(p["text"]) <= max_chars]
        self.max_chars = max_chars

    def row(self, rng, n, unanswerable):
        """(passages, asked [(question, answer, index of the passage or None)]): all questions of one passage, some of the others', and with
        probability `unanswerable` one of a passage that is not among them."""
        at = self.asked[rng.integers(len(self.asked))]
        first = self.all[at]
        question, answer = first["qas"][rng.integers(len(first["qas"]))]
        chosen, absent = [at], []
        for other in self.near[at][rng.permutation(N_NEAR)]:
            p = self.all[other]
            if len(p["text"]) > self.max_chars or answer.lower() in p["text"].lower():
                continue
            (chosen if len(chosen) < n else absent).append(int(other))
        order = rng.permutation(len(chosen))
        passages = [self.all[chosen[i]] for i in order]
        asked = []
        for i, p in zip(order, passages):
            qas = in_random_order(rng, p["qas"])
            asked += [(q, a, int(np.flatnonzero(order == i)[0])) for q, a in (qas if i == 0 else qas[: int(rng.integers(0, 4))])]
        asked = in_random_order(rng, asked)
        if absent and rng.random() < unanswerable:
            p = self.all[absent[rng.integers(len(absent))]]
            texts = " ".join(p["text"] for p in passages).lower()
            for q, a in in_random_order(rng, p["qas"]):
                if a.lower() not in texts:
                    asked.insert(int(rng.integers(0, min(4, len(asked)) + 1)), (q, NO_ANSWER, None))
                    break
        return passages, asked


class Asker:
    """Draws rows: (context segments, asked). `sources`: {name: [weight, most passages]} of tasks.py, "squad" being ours."""

    def __init__(self, folder, sources, sizes, unanswerable=0.3, others=3):
        others_of = {name: value for name, value in sources.items() if name != "squad"}
        self.tasks = Tasks(folder, others_of, follow_up=0.0) if others_of else None
        total = sum(w for w, _ in sources.values())
        self.share = sources.get("squad", [0])[0] / total
        tasks = Path(folder) / "tasks"
        self.squad = NearPassages(tasks / "squad.jsonl", tasks / "squad-near.npy") if self.share else None
        self.sizes, self.unanswerable, self.others = sizes, unanswerable, others
        strict = self.tasks and "facts" in self.tasks.names
        if strict:
            self.tasks.sources[self.tasks.names.index("facts")].maker = FactMaker("train", strict=True)

    def size(self, rng):
        """How many passages: `sizes` is [[share, least, most], ...]"""
        shares = np.array([s[0] for s in self.sizes], dtype=float)
        _, low, high = self.sizes[rng.choice(len(shares), p=shares / shares.sum())]
        return int(rng.integers(low, high + 1))

    def row(self, rng):
        """(source, passages, asked)"""
        n = self.size(rng)
        if rng.random() < self.share:
            return "squad", *self.squad.row(rng, n, self.unanswerable)
        i = int(rng.choice(len(self.tasks.names), p=self.tasks.weights))
        source, n = self.tasks.sources[i], min(n, self.tasks.max_passages[i])
        passages, gold, qas = source.task(rng, n)
        asked = [(q, a, gold) for q, a in qas]
        for j, p in enumerate(passages):
            if j != gold:
                asked += [(q, a, j) for q, a in source.questions_on(rng, p)[: int(rng.integers(self.others + 1))]]
        return self.tasks.names[i], passages, in_random_order(rng, asked)


class Template:
    """The template's pieces in ids. Special tokens in them are tokens; in passages, questions and answers their spelling is text."""

    def __init__(self, tokenizer_file, template, end):
        self.segments, self.end = Segments(tokenizer_file), end
        plain = self.segments.tokenizer.encode_special_tokens
        self.segments.tokenizer.encode_special_tokens = False
        ids = {name: self.segments(text) for name, text in template.items()}
        self.segments.tokenizer.encode_special_tokens = plain
        self.before, self.prefix, self.suffix = ids["before"], ids["passage_prefix"], ids["passage_suffix"]
        self.before_question, self.after_question = ids["question_prefix"], ids["question_suffix"]
        self.text = self.before[:1]  # what text without a question begins with, as in `refrag eval perplexity`

    def passage(self, passage):
        return self.segments.passage(passage)

    def context(self, passages):
        """Ids of everything before the question."""
        out = list(self.before)
        for p in passages:
            out += [*self.prefix, *self.passage(p), *self.suffix]
        return out

    def question(self, question):
        return self.before_question + self.segments(question) + self.after_question

    def answer(self, answer):
        return self.segments(" " + answer) + [self.end]


def draw(asker, template, rng, max_context, max_asked, max_answer=64):
    """(source, Branched): one that fits."""
    while True:
        source, passages, asked = asker.row(rng)
        if sum(len(p["text"]) for p in passages) > 7 * max_context:
            continue
        context = template.context(passages)
        if len(context) > max_context:
            continue
        branches, room = [], max_asked
        for q, a, _ in asked:
            question, answer = template.question(q), template.answer(a)
            if len(answer) <= max_answer and len(question) + len(answer) <= room:
                branches.append((question, answer))
                room -= len(question) + len(answer)
        if branches:
            return source, Branched(context, branches)


def draw_part(asker, template, rng, data, place):
    """Rows of about one length for a part of a step, near `place` (0 .. 1) of a pool's positions in order of length."""
    pool, drawn = [], 0
    while drawn < data["pool"] * data["positions"]:
        pool.append(draw(asker, template, rng, data["max_context"], data["max_asked"])[1])
        drawn += len(pool[-1])
    pool.sort(key=len)
    lengths = np.array([len(r) for r in pool])
    begin = int(np.searchsorted(np.cumsum(lengths), min(place * lengths.sum(), lengths.sum() - 1), side="right"))
    end = begin + 1
    while end - begin < len(pool):
        downwards = begin > 0 and (end == len(pool) or rng.random() < 0.5)
        if lengths[end - 1 if downwards else end] * (end - begin + 1) > data["positions"]:
            break
        begin, end = (begin - 1, end) if downwards else (begin, end + 1)
    return pool[begin:end]


def held_out(path, template, limit, seed=5):
    """`limit` passages of a file of question lines as rows with all their questions, each alone."""
    by_text = {}
    for line in read_jsonl(path):
        if line["answers"]:
            by_text.setdefault(line["text"], (line, []))[1].append((line["question"], line["answers"][0]))
    passages = list(by_text.values())
    rows = []
    for i in np.random.default_rng(seed).permutation(len(passages))[:limit]:
        line, asked = passages[i]
        rows.append(Branched(template.context([line]), [(template.question(q), template.answer(a)) for q, a in asked]))
    return sorted(rows, key=len)


def main():
    parser = argparse.ArgumentParser(description="Writes the passages of SQuAD that BM25 finds for each one's questions.")
    parser.add_argument("--folder", required=True, help="where prepare.py wrote")
    args = parser.parse_args()
    tasks = Path(args.folder) / "tasks"
    np.save(tasks / "squad-near.npy", near_passages(read_jsonl(tasks / "squad.jsonl")))


if __name__ == "__main__":
    main()
