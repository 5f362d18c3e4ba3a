"""Questions over passages, without end: each source's `task(rng, n)` draws n passages in random order, one of which answers.

A task is (passages, gold, qas): passages [{"title", "text"}], gold the index of the one that answers, or None where the
answer is NO_ANSWER, and qas [(question, answer)] on that passage, to be asked one after another. A conversation on the same
passages asks about others of them too: where most of a row is passages, that is where most of its answers come from.
"""
import json
import re
from pathlib import Path

import numpy as np

from .corpora import NO_ANSWER
from .facts import FactMaker


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def in_random_order(rng, items):
    return [items[i] for i in rng.permutation(len(items))]


def shuffled(rng, passages):
    """(passages in random order, where the first of them is now)"""
    order = rng.permutation(len(passages))
    return [passages[i] for i in order], int(np.flatnonzero(order == 0)[0])


class Facts:
    """Invented entities (facts.py). Some follow-up questions say "it" instead of the name, and some tasks have no answer."""

    def __init__(self, split="train", no_answer=0.1, follow_up=0.35):
        self.maker, self.no_answer, self.follow_up = FactMaker(split), no_answer, follow_up

    def questions_on(self, rng, passage):
        qas = in_random_order(rng, passage["qas"])
        name, kind = passage["name"], passage["kind"]
        return [qas[0]] + [(FactMaker.pronoun(q, name, kind) if rng.random() < self.follow_up else q, a) for q, a in qas[1:]]

    def task(self, rng, n):
        unanswerable = n > 1 and rng.random() < self.no_answer
        passages, gold, qas = self.maker.task(rng, n)
        if unanswerable:
            return passages[:gold] + passages[gold + 1 :], None, [(q, NO_ANSWER) for q, _ in in_random_order(rng, qas)]
        return passages, gold, self.questions_on(rng, passages[gold])


class Passages:
    """One of tasks/KIND.jsonl. Distractors are passages of other titles. `no_answer`: share of tasks whose own passage is taken away;
    `spread`: distractors are drawn among the `spread` passages around, which are alike, half the time."""

    def __init__(self, path, no_answer=0.0, max_chars=1500, max_answer_chars=None, spread=0):
        rows = read_jsonl(path)
        self.no_answer, self.spread = no_answer, spread
        self.all = [p for p in rows if len(p["text"]) <= max_chars]
        for p in self.all:
            p["qas"] = [(q, a) for q, a in p["qas"] if not max_answer_chars or len(a) <= max_answer_chars]
        self.asked = [i for i, p in enumerate(self.all) if p["qas"]]

    def questions_on(self, rng, passage):
        return in_random_order(rng, passage["qas"])

    def task(self, rng, n):
        at = self.asked[rng.integers(len(self.asked))]
        p = self.all[at]
        chosen = [p]
        tries = 0
        while len(chosen) < n:
            tries += 1
            near = self.spread and tries < 20 and rng.random() < 0.5
            other = self.all[(at + int(rng.integers(1, self.spread))) % len(self.all) if near else rng.integers(len(self.all))]
            if other is not p and (other["title"] != p["title"] or near or not p["title"]):
                chosen.append(other)
        qas = self.questions_on(rng, p)
        if n > 1 and rng.random() < self.no_answer:
            chosen = chosen[1:]
            return in_random_order(rng, chosen), None, [(qas[0][0], NO_ANSWER)]
        passages, gold = shuffled(rng, chosen)
        return passages, gold, qas


class Cloze(Passages):
    """A word left out of a sentence of a textbook's paragraph; the word occurs once in the paragraph."""

    def questions(self, rng, text, n):
        tokens = text.split(" ")
        counts = {}
        for t in tokens:
            counts[t.strip(".,;:()")] = counts.get(t.strip(".,;:()"), 0) + 1
        places = [i for i, t in enumerate(tokens)
                  if counts[w := t.strip(".,;:()")] == 1 and 0 < i and (len(w) >= 7 or w[:1].isupper() or w.isdigit()) and re.fullmatch(r"[\w'-]+", w)]
        out = []
        for i in rng.permutation(len(places))[:n]:
            at = places[i]
            word = tokens[at].strip(".,;:()")
            before, after = tokens[max(0, at - int(rng.integers(3, 10))) : at], tokens[at + 1 : at + int(rng.integers(2, 8))]
            said = " ".join([*before, tokens[at].replace(word, "____"), *after])
            out.append((f"Which word is missing: {said}?", word))
        return out

    def __init__(self, path, **options):
        super().__init__(path, **options)
        self.asked = list(range(len(self.all)))

    def questions_on(self, rng, passage):
        return self.questions(rng, passage["text"], 4)

    def task(self, rng, n):
        while True:
            at = int(rng.integers(len(self.all)))
            qas = self.questions_on(rng, self.all[at])
            if qas:
                break
        passages, gold = shuffled(rng, [self.all[at], *(self.all[i] for i in rng.integers(len(self.all), size=n - 1))])
        return passages, gold, qas


class Factbook:
    """A few fields of a country as passage, and questions for them."""

    def __init__(self, path, no_answer=0.1):
        self.no_answer = no_answer
        self.countries = [(p["title"], [(self.label(k), v) for k, v in p["fields"].items() if 1 < len(v) <= 90]) for p in read_jsonl(path)]
        self.countries = [c for c in self.countries if len(c[1]) >= 12]

    @staticmethod
    def label(field):
        """"People and Society / Median age / total" -> "median age, total" """
        parts = [p.strip() for p in field.split(" / ")[1:]] or [field]
        if len(parts) > 1 and parts[1].lower().startswith(parts[0].lower()):
            parts = parts[1:]
        return ", ".join(p if p[:2].isupper() else p[:1].lower() + p[1:] for p in parts)

    def passage(self, rng, country, n_fields):
        title, fields = country
        chosen = [fields[i] for i in rng.permutation(len(fields))[:n_fields]]
        ask = ("What is the {l} of {t}?", "{t}: {l}?", "What does the factbook say about the {l} of {t}?")
        qas = [(ask[rng.integers(len(ask))].format(l=l, t=title), v) for l, v in chosen]
        return {"title": title, "text": "\n".join(f"{l}: {v}" for l, v in chosen), "qas": qas}

    def questions_on(self, rng, passage):
        return in_random_order(rng, passage["qas"])

    def task(self, rng, n):
        chosen = [self.passage(rng, self.countries[i], int(rng.integers(3, 9))) for i in rng.permutation(len(self.countries))[:n]]
        qas = self.questions_on(rng, chosen[0])
        if n > 1 and rng.random() < self.no_answer:
            return chosen[1:], None, [(q, NO_ANSWER) for q, _ in qas[:2]]
        passages, gold = shuffled(rng, chosen)
        return passages, gold, qas


def open_source(folder, name, follow_up=0.35):
    """The source of this name in a folder of prepare.py; its settings are decided here. `follow_up`: share of later questions on generated
    facts that say "it"."""
    path = Path(folder) / f"tasks/{name}.jsonl"
    if name == "facts":
        return Facts(follow_up=follow_up)
    if name == "factbook":
        return Factbook(path)
    if name == "cloze":
        return Cloze(path, max_chars=1200)
    return {
        "squad": lambda: Passages(path, no_answer=0.15, max_chars=1100, max_answer_chars=80, spread=12),
        "boolq": lambda: Passages(path, max_chars=1100),
        "fairytaleqa": lambda: Passages(path, no_answer=0.05, max_answer_chars=160, spread=8),
        "medquad": lambda: Passages(path, max_chars=2000, spread=6),
        "scitldr": lambda: Passages(path, max_chars=2500),
        "qmsum": lambda: Passages(path, max_chars=6000),
    }[name]()


class Tasks:
    """Sources drawn with given weights, and how many passages at most a task of each has: {name: [weight, max_passages]}."""

    def __init__(self, folder, sources, **options):
        self.names = list(sources)
        self.sources = [open_source(folder, name, **options) for name in sources]
        self.weights = np.array([w for w, _ in sources.values()], dtype=float)
        self.weights /= self.weights.sum()
        self.max_passages = [n for _, n in sources.values()]

    def task(self, rng, n=None):
        """(name of the source, passages, gold, qas)"""
        i = int(rng.choice(len(self.sources), p=self.weights))
        return self.names[i], *self.sources[i].task(rng, n or int(rng.integers(1, self.max_passages[i] + 1)))

    def conversation(self, rng, others):
        """(name of the source, passages, asked): asked [(question, answer, index of the passage that answers, or None)]. Questions on one
        passage follow each other; on each passage beside the task's own there are at most `others`."""
        name, passages, gold, qas = self.task(rng)
        source = self.sources[self.names.index(name)]
        runs = [[(q, a, gold) for q, a in qas]]
        for i, passage in enumerate(passages):
            if i != gold and others:
                runs.append([(q, a, i) for q, a in source.questions_on(rng, passage)[: int(rng.integers(others + 1))]])
        return name, passages, [asked for run in in_random_order(rng, runs) for asked in run]
