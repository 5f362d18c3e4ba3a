"""Windows of text from datasets that are read as they come, never whole: `datasets` in streaming mode, on disk or from the hub.

[[data.stream]] tables, drawn by weight, window by window:
    name, weight
    path      a dataset of the hub ("cerebras/SlimPajama-627B"), or files: a pattern that ends in .parquet, .jsonl, .json or .txt
              (those may end in .gz, .zst or .xz as well)
    config, split ("train"), revision        of a dataset of the hub
    column    the texts' column ("text"); of .txt files a line is a text, with whole_files = true a file is
    where     {"meta.redpajama_set_name" = "RedPajamaBook"}: only rows with these values are read

A window lies inside one text, from its beginning on, without gaps; what is left of a text when the next window is longer is passed
over, as are texts that are too short. Processes read different rows. Rows come in blocks of `shuffle` ([data], 64): inside a block
in an order drawn from seed, pass and block. So a state is small: the place where the block began, how many of its texts are used up,
and how many tokens of the one at hand. With it a run goes on with the very next window, as long as the number of processes is the
same. After the last row the first comes again, in another order.
"""
import copy
import glob
import re

import numpy as np
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node

from .batches import GOLDEN, Segments

BUILDERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "txt": "text"}
MAX_REFUSED = 100_000  # rows in turn that are too short, or not wanted, before the reader gives up


def open_dataset(table):
    """The rows of one [[data.stream]] table."""
    path = table["path"]
    kind = re.search(r"\.(parquet|jsonl|json|txt)(\.(gz|zst|xz))?$", path)
    if not kind:
        return load_dataset(path, table.get("config"), split=table.get("split", "train"), revision=table.get("revision"), streaming=True)
    files = sorted(glob.glob(path, recursive=True)) if "://" not in path else [path]
    if not files:
        raise FileNotFoundError(f"[data.stream] {table['name']}: expected files at {path}, found none")
    more = {"sample_by": "document"} if kind[1] == "txt" and table.get("whole_files") else {}
    return load_dataset(BUILDERS[kind[1]], data_files=files, split="train", streaming=True, **more)


def value_at(row, dotted):
    for key in dotted.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


class Source:
    """One dataset's texts as token ids. rows: an iterable with state_dict and load_state_dict (a streaming dataset)."""

    def __init__(self, rows, tokenize, table, seed, shuffle):
        self.rows, self.tokenize, self.table, self.seed, self.shuffle = rows, tokenize, table, seed, shuffle
        self.column, self.where = table.get("column", "text"), table.get("where", {})
        self.beginning = copy.deepcopy(rows.state_dict())
        self.iterator = iter(rows)
        self.epoch, self.block, self.used, self.at = 0, 0, 0, 0  # passes, blocks of this one, texts of the block, tokens of the text
        self.texts, self.ids = [], None
        self.read_block()

    def read_block(self):
        """The next `shuffle` texts, in their order; begins a new pass where there are none."""
        refused = 0
        for beginning in (False, True):
            self.block_start, self.texts = copy.deepcopy(self.rows.state_dict()), []
            for row in self.iterator:
                text = row.get(self.column)
                if isinstance(text, str) and text and all(value_at(row, key) == value for key, value in self.where.items()):
                    self.texts.append(text)
                    refused = 0
                else:
                    refused += 1
                if len(self.texts) == self.shuffle or refused > MAX_REFUSED:
                    break
            if self.texts:
                break
            if beginning or refused > MAX_REFUSED:
                wanted = f"{self.column} and {self.where}" if self.where else self.column
                raise ValueError(f"[data.stream] {self.table['name']}: expected rows with {wanted}, found none")
            self.epoch, self.block = self.epoch + 1, 0
            self.rows.load_state_dict(copy.deepcopy(self.beginning))
            self.iterator = iter(self.rows)
        order = np.random.default_rng([*self.seed, self.epoch, self.block]).permutation(len(self.texts))
        self.texts = [self.texts[i] for i in order]
        self.used, self.at, self.ids = 0, 0, None

    def window(self, n_tokens):
        for _ in range(MAX_REFUSED):
            if self.used == len(self.texts):
                self.block += 1
                self.read_block()
            if self.ids is None:
                self.ids = np.array(self.tokenize(self.texts[self.used]), dtype=np.int64)
            if len(self.ids) - self.at >= n_tokens:
                self.at += n_tokens
                return self.ids[self.at - n_tokens : self.at]
            self.used, self.at, self.ids = self.used + 1, 0, None
        raise ValueError(f"[data.stream] {self.table['name']}: expected texts of {n_tokens} tokens, found none among {MAX_REFUSED}")

    def state_dict(self):
        return {"rows": self.block_start, "epoch": self.epoch, "block": self.block, "used": self.used, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.block = state["epoch"], state["block"]
        self.rows.load_state_dict(copy.deepcopy(state["rows"]))
        self.iterator = iter(self.rows)
        self.read_block()
        self.used, self.at, self.ids = state["used"], state["at"], None


class Stream:
    """The interface of batches.Text: window(rng, n). Its state is kept with the run's checkpoints."""

    def __init__(self, cfg, world):
        data, seed = cfg["data"], cfg["run"]["seed"]
        tokenize = Segments(f"{cfg['decoder'].get('path') or data['folder']}/tokenizer.json")
        tables = data["stream"]
        self.sources = []
        for i, table in enumerate(tables):
            rows = split_dataset_by_node(open_dataset(table), rank=world.rank, world_size=world.size)
            self.sources.append(Source(rows, tokenize, table, [seed, i, world.rank], data.get("shuffle", 64)))
        weights = np.array([t["weight"] for t in tables], dtype=float)
        self.weights = weights / weights.sum()
        world.streams["text"] = self

    def window(self, rng, n_tokens):
        return self.sources[rng.choice(len(self.sources), p=self.weights)].window(n_tokens)

    def even(self, i, n_tokens):
        """Windows are read through in any case; the source's turn comes by its weight."""
        place = i * GOLDEN % 1.0
        at = min(int(np.searchsorted(self.weights.cumsum(), place, side="right")), len(self.sources) - 1)
        return self.sources[at].window(n_tokens)

    def state_dict(self):
        return {"sources": [s.state_dict() for s in self.sources]}

    def load_state_dict(self, state):
        for source, kept in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(kept)
