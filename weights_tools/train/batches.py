"""Random access to the training data as token ids: windows of plain text, and questions over passages."""
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .model import BOS, EOS

GOLDEN = 0.6180339887498949


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
    """Windows of consecutive tokens from the sources of prepare.py. A window may span two texts.

    A place is a number in [0, 1): each source owns a stretch of it as wide as its weight. `even(i)` gives places that fill [0, 1)
    evenly as i counts up (multiples of the golden ratio), so that text is read through and not drawn with repeats."""

    def __init__(self, folder, weights):
        self.sources = [np.load(Path(folder) / f"text/{name}.npy", mmap_mode="r") for name in weights]
        w = np.array(list(weights.values()), dtype=float)
        self.edges = np.concatenate([[0.0], np.cumsum(w / w.sum())])

    def at(self, place, n_tokens):
        i = min(int(np.searchsorted(self.edges, place, side="right")) - 1, len(self.sources) - 1)
        source, inside = self.sources[i], (place - self.edges[i]) / (self.edges[i + 1] - self.edges[i])
        start = int(inside * (len(source) - n_tokens))
        return source[start : start + n_tokens].astype(np.int64)

    def window(self, rng, n_tokens):
        return self.at(rng.random(), n_tokens)

    def even(self, i, n_tokens):
        return self.at(i * GOLDEN % 1.0, n_tokens)


class Qa:
    """Question tasks in the model's template, tokenised segment by segment."""

    def __init__(self, segments, template, bos=BOS, eos=EOS, tasks=None):
        self.segments, self.bos, self.eos, self.tasks = segments, bos, eos, tasks
        self.suffix = segments(template["passage_suffix"])
        self.before_question, self.after_question = segments(template["question_prefix"]), segments(template["question_suffix"])

    def question(self, question):
        return self.before_question + self.segments(question) + self.after_question

    def answer(self, answer):
        return self.segments(" " + answer) + [self.eos]

    def row(self, rng, length, others, max_answer=64):
        """A row of tokens alone: passages, then questions about them (Tasks.conversation), again and again, exactly `length` ids; and
        which of them belong to answers. Tasks that do not fit into what is left of the row are passed over a few times, then cut."""
        ids, is_answer, misses = [], [], 0
        while len(ids) < length:
            _, passages, asked = self.tasks.conversation(rng, others)
            block = [self.bos]
            for p in passages:
                block += self.segments.passage(p) + self.suffix
            if len(ids) + len(block) + 16 > length and misses < 8:
                misses += 1
                continue
            ids += block
            is_answer += [False] * len(block)
            for q, a, _ in asked[:16]:
                question, answer = self.question(q), self.answer(a)
                if len(answer) > max_answer:
                    continue
                ids += question + answer
                is_answer += [False] * len(question) + [True] * len(answer)
        return ids[:length], is_answer[:length]
