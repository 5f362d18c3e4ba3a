"""Random access to the training data: windows of plain text, generated look-ups, SQuAD questions, all as token ids."""
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .facts import FactMaker
from .model import BOS, EOS


class Segments:
    """Tokenises each segment alone: no special token is added and their spellings in text are ordinary text."""

    def __init__(self, tokenizer_file):
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.encode_special_tokens = True

    def __call__(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def passage(self, passage):
        title = passage.get("title", "")
        return self(f"{title}\n{passage['text']}" if title else passage["text"])


class Text:
    """Windows of consecutive tokens; sources are drawn with given weights, places evenly. A window may span two texts."""

    def __init__(self, folder, weights):
        self.sources = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in weights]
        self.weights = np.array(list(weights.values()), dtype=float)
        self.weights /= self.weights.sum()

    def window(self, rng, n_tokens):
        source = self.sources[rng.choice(len(self.sources), p=self.weights)]
        start = int(rng.integers(len(source) - n_tokens))
        return source[start : start + n_tokens].astype(np.int64)


class Squad:
    """Passages of SQuAD with their questions; distractors come from other articles."""

    def __init__(self, path, max_answer_chars=60, max_passage_chars=900):
        self.items, self.by_article = [], []
        for a in json.loads(Path(path).read_text()):
            here = [p for p in a["passages"] if len(p["text"]) <= max_passage_chars]
            qas = [(i, q, t) for i, p in enumerate(here) for q, t in p["qas"] if len(t) <= max_answer_chars]
            if qas:
                self.by_article.append((a["title"], here, qas))

    def task(self, rng, n_passages):
        """The same tuple as FactMaker.task."""
        title, passages, qas = self.by_article[rng.integers(len(self.by_article))]
        i = qas[rng.integers(len(qas))][0]
        asked = [(q, a) for j, q, a in qas if j == i]
        chosen = [{"title": title, "text": passages[i]["text"]}]
        while len(chosen) < n_passages:
            other, others, _ = self.by_article[rng.integers(len(self.by_article))]
            if other != title:
                chosen.append({"title": other, "text": others[rng.integers(len(others))]["text"]})
        order = rng.permutation(n_passages)
        return [chosen[j] for j in order], int(np.flatnonzero(order == 0)[0]), asked


class Qa:
    """Question tasks in the model's template, tokenised segment by segment."""

    def __init__(self, segments, template, maker=None, squad=None):
        self.segments, self.maker, self.squad = segments, maker, squad
        self.suffix = segments(template["passage_suffix"])
        self.before_question, self.after_question = segments(template["question_prefix"]), segments(template["question_suffix"])

    def question(self, question):
        return self.before_question + self.segments(question) + self.after_question

    def answer(self, answer):
        return self.segments(" " + answer) + [EOS]

    def look_up_row(self, rng, length):
        """A full-token row for pre-training: several passages, then many questions about them, exactly `length` ids; and which
        of them belong to answers."""
        ids, is_answer = [], []
        while len(ids) < length:
            n = int(rng.integers(1, 6))
            passages, names, qas = [], set(), []
            while len(passages) < n:
                p = self.maker.passage(rng)
                if p["name"] not in names:
                    names.add(p["name"])
                    passages.append(p)
                    qas += p["qas"]
            ids.append(BOS)
            for p in passages:
                ids += self.segments.passage(p) + self.suffix
            is_answer += [False] * (len(ids) - len(is_answer))
            for i in rng.permutation(len(qas))[:10]:
                question, answer = self.question(qas[i][0]), self.answer(qas[i][1])
                ids += question + answer
                is_answer += [False] * len(question) + [True] * len(answer)
        return ids[:length], is_answer[:length]
