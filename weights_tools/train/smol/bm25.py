"""BM25 over passages, to find those that look as if they held an answer and do not."""
import re
from collections import Counter, defaultdict

import numpy as np


def terms(text):
    return re.findall(r"\w+", text.lower())


class Bm25:
    def __init__(self, texts, k1=1.2, b=0.75):
        found, lengths = defaultdict(list), np.zeros(len(texts), dtype=np.float32)
        for i, text in enumerate(texts):
            counts = Counter(terms(text))
            lengths[i] = sum(counts.values())
            for term, n in counts.items():
                found[term].append((i, n))
        long = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
        self.n, self.postings = len(texts), {}
        for term, pairs in found.items():
            at = np.array([i for i, _ in pairs])
            n = np.array([c for _, c in pairs], dtype=np.float32)
            weight = np.log(1 + (len(texts) - len(at) + 0.5) / (len(at) + 0.5))
            self.postings[term] = at, weight * n * (k1 + 1) / (n + long[at])

    def scores(self, query):
        out = np.zeros(self.n, dtype=np.float32)
        for term in set(terms(query)):
            if term in self.postings:
                at, value = self.postings[term]
                out[at] += value
        return out

    def best(self, query, n):
        """The n passages of the largest scores, best first."""
        scores = self.scores(query)
        n = min(n, self.n)
        some = np.argpartition(-scores, n - 1)[:n]
        return some[np.argsort(-scores[some], kind="stable")]
