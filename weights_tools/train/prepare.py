"""Turns the public corpora into what the trainer reads. Everything is deterministic; nothing is downloaded.

    python -m weights_tools.train.prepare --data DIR --out build/train/data      (DIR defaults to $REFRAG_TEST_DATA)

    OUT/tokenizer.json           one byte-level BPE for decoder and encoder, or the one given with --tokenizer
    OUT/text/SOURCE.npy          token ids of the training text, uint16
    OUT/tasks/KIND.jsonl         passages with questions for training
    OUT/validation/              text and questions on which settings are chosen
    OUT/test/                    text and questions for `refrag eval`; no stage nor the tokenizer has seen them
    OUT/counts.json              texts, characters and tokens of every source, and what was dropped as a repeat

For a machine without the corpora, `--pack FILE` writes what training reads as one .tar.xz (nothing of validation and test), and
`--unpack FILE` makes OUT of it there: text that tasks hold too is left out and made again.
"""
import argparse
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import facts
from .corpora import NO_ANSWER, cloze_paragraphs, load, passage_text, squad_articles
from .facts import FactMaker
from .tasks import Cloze, Factbook, read_jsonl

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
TOKENIZER_SAMPLE = {"textbooks": 9e6, "novels": 6e6, "squad": 6e6, "boolq": 2e6, "medquad": 2e6, "factbook": 1e6, "fairytaleqa": 1e6,
                    "scitldr": 1e6, "meetings": 5e5, "squality": 5e5}


def make_tokenizer(texts, fact_texts, vocab_size):
    """Byte-level BPE in the GPT-2 manner on a sample of the training text (and of the generated facts)."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()

    def sample():
        for source, share in TOKENIZER_SAMPLE.items():
            per_text = int(share / max(1, len(texts.get(source, []))))
            for t in texts.get(source, []):
                yield t[:per_text]
        yield from fact_texts

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        sample(), trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    return tok


def middle(text, size):
    """`size` characters from the middle of a book, past prefaces and tables of contents, from the start of a line."""
    return text[len(text) // 3 : len(text) // 3 + size].split("\n", 1)[-1]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def conversation_lines(passages, least=3):
    """Lines for `refrag eval qa --data` with turns: the answerable questions of a passage, one after another."""
    for i, p in enumerate(passages):
        turns = [{"question": q, "answers": [a]} for q, a in p["qas"] if a != NO_ANSWER]
        if len(turns) >= least:
            yield {"id": str(i), "title": p["title"], "text": p["text"], "turns": turns}


def made_lines(source, n_tasks):
    """Questions that a source of tasks.py makes itself, as lines."""
    rng = np.random.default_rng(13)
    for i in range(n_tasks):
        passages, gold, qas = source.task(rng, 1)
        yield {"id": str(i), "title": passages[gold]["title"], "text": passages[gold]["text"], "question": qas[0][0], "answers": [qas[0][1]]}


def question_lines(passages):
    """Lines for `refrag eval qa --data`: one question each; an unanswerable one has no answers."""
    for i, p in enumerate(passages):
        for j, (question, answer) in enumerate(p["qas"]):
            answers = [] if answer == NO_ANSWER else [answer]
            yield {"id": f"{i}-{j}", "title": p["title"], "text": p["text"], "question": question, "answers": answers}


def write_held_out(folder, part, book_size):
    for source, texts in part["text"].items():
        if source in ("textbooks", "novels", "squality"):
            share = book_size // len(texts)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{source}.txt").write_text("\n".join(middle(t, share) for t in texts), encoding="utf-8")
    for kind, passages in part["tasks"].items():
        write_jsonl(folder / f"{kind}.jsonl", passages if kind in ("cloze", "factbook") else question_lines(passages))
    for kind, source in (("cloze", Cloze), ("factbook", Factbook)):  # made of whole passages: these turn into questions
        if kind in part["tasks"]:
            write_jsonl(folder / f"{kind}.jsonl", list(made_lines(source(folder / f"{kind}.jsonl"), 600)))


def save_text(tok, out, source, texts):
    """Writes OUT/text/SOURCE.npy; returns its number of tokens."""
    (out / "text").mkdir(parents=True, exist_ok=True)
    assert tok.get_vocab_size() <= 1 << 16, f"{out}/tokenizer.json: expected at most 65536 ids, found {tok.get_vocab_size()}"
    ids = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tok.encode_batch([t + "\n" for t in texts], add_special_tokens=False)])
    np.save(out / f"text/{source}.npy", ids)
    return len(ids)


def open_tokenizer(path):
    tok = Tokenizer.from_file(str(path))
    tok.encode_special_tokens = True
    return tok


MADE_AGAIN = ("squad", "boolq", "medquad", "fairytaleqa", "scitldr")  # text that is the tasks' passages


def pack(folder, file):
    def wanted(member):
        name = member.name.removeprefix("./")
        keep = name == "tokenizer.json" or (name.startswith("text/") and Path(name).stem not in MADE_AGAIN) or (
            name.startswith("tasks/") and name != "tasks/cloze.jsonl")
        return member if keep or member.isdir() and name in (".", "text", "tasks") else None

    with tarfile.open(f"{file}.tmp", "w:xz", preset=9) as tar:
        tar.add(folder, ".", filter=wanted)
    os.replace(f"{file}.tmp", file)


def unpack(file, out):
    with tarfile.open(file, "r:xz") as tar:
        tar.extractall(out, filter="data")
    tok = open_tokenizer(out / "tokenizer.json")
    for source in MADE_AGAIN:
        save_text(tok, out, source, [passage_text(p) for p in read_jsonl(out / f"tasks/{source}.jsonl")])
    books = tok.decode(np.load(out / "text/textbooks.npy").tolist(), skip_special_tokens=False)
    write_jsonl(out / "tasks/cloze.jsonl", cloze_paragraphs([books]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("REFRAG_TEST_DATA"), help="folder of the corpora")
    parser.add_argument("--out", required=True)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of a decoder that exists; without it one is made of the text")
    parser.add_argument("--pack", metavar="FILE", help="write what is in OUT, as far as training reads it, to one file")
    parser.add_argument("--unpack", metavar="FILE", help="make OUT of such a file")
    args = parser.parse_args()
    out = Path(args.out)
    if args.pack:
        return pack(out, args.pack)
    if args.unpack:
        return unpack(args.unpack, out)
    if not args.data:
        parser.error("--data or REFRAG_TEST_DATA is needed")
    data = Path(args.data)
    parts, dropped = load(data)
    train = parts["train"]
    for source, (n, size) in dropped.items():
        print(f"{source}: {n} paragraphs, {size} characters dropped as repeats", flush=True)
    for kind, passages in train["tasks"].items():
        write_jsonl(out / f"tasks/{kind}.jsonl", passages)
    write_held_out(out / "validation", parts["validation"], 300_000)
    write_held_out(out / "test", parts["test"], 600_000)
    for name in ("1.1", "2.0"):
        passages = [p for a in squad_articles(data / f"qa/squad-dev-v{name}.open.json.xz") for p in a["passages"]]
        write_jsonl(out / f"test/squad-dev-{name}.jsonl", question_lines(passages))
        if name == "1.1":
            write_jsonl(out / "test/squad-dev-turns.jsonl", conversation_lines(passages))
    for turns in (False, True):
        write_jsonl(out / f"test/facts{'-turns' if turns else ''}.jsonl", facts.lines("test", 400, 11, turns=turns))

    write_jsonl(out / "test/facts-strict.jsonl", facts.lines("test", 400, 11, strict=True))
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, out / "tokenizer.json")
    else:
        maker, rng = FactMaker("train"), np.random.default_rng(7)
        samples = []
        for _ in range(3000):
            p = maker.passage(rng)
            samples.append(p["title"] + "\n" + p["text"] + "\n" + "\n".join(q + " " + a for q, a in p["qas"]))
        tok = make_tokenizer(train["text"], samples, args.vocab_size)
        # Compact JSON: a third of the pretty-printed size, the same tokenizer.
        (out / "tokenizer.json").write_text(json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
    tok = open_tokenizer(out / "tokenizer.json")
    counts = {"dropped": dropped, "text": {}, "tasks": {k: sum(len(p.get("qas", ())) for p in v) for k, v in train["tasks"].items()}}
    for source, texts in train["text"].items():
        tokens = save_text(tok, out, source, texts)
        counts["text"][source] = {"texts": len(texts), "characters": sum(map(len, texts)), "tokens": tokens}
        print(f"{source}: {counts['text'][source]}", flush=True)
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
