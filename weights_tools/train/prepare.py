"""Turns the public corpora into what the trainer reads: one tokenizer and one flat array of token ids per source.

Held out, and never seen by any training stage nor by the tokenizer: one textbook, every 15th novel, every 20th article of
SQuAD and every 12th country. Their text is written to `heldout_text.txt`, `heldout_novels.txt` and `heldout_squad.json`
for `evaluate.py` and for `refrag eval perplexity --text`. Everything is deterministic; nothing is downloaded.

    python -m weights_tools.train.prepare --data DIR --out build/train/data      (DIR defaults to $REFRAG_TEST_DATA)
"""
import argparse
import json
import lzma
import os
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
HELD_OUT_TEXTBOOK = "astronomy.txt"
NOVEL_STRIDE, ARTICLE_STRIDE, COUNTRY_STRIDE = 15, 20, 12


def read_tar(path):
    """name -> text of every file in a .tar.xz, sorted by name."""
    with tarfile.open(path, "r:xz") as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        return {Path(m.name).name: tar.extractfile(m).read().decode("utf-8") for m in members}


def read_jsonl(path):
    with lzma.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def squad_articles(path):
    """[{title, passages: [{text, qas: [(question, answer)]}]}]"""
    with lzma.open(path, "rt", encoding="utf-8") as f:
        data = json.load(f)["data"]
    return [
        {
            "title": a["title"].replace("_", " "),
            "passages": [
                {"text": p["context"].strip(), "qas": [(q["question"].strip(), q["answers"][0]["text"]) for q in p["qas"]]}
                for p in a["paragraphs"]
            ],
        }
        for a in data
    ]


def factbook_text(row):
    fields = [f"{k.split(' / ')[-1]}: {v}" for k, v in row["fields"].items() if len(v) > 80]
    return row["country"] + "\n" + "\n".join(fields)


def load(data):
    """(training texts by source, held-out texts by source, training SQuAD, held-out SQuAD)"""
    books, novels = read_tar(data / "text/textbooks.tar.xz"), read_tar(data / "text/novels.tar.xz")
    squad = squad_articles(data / "qa/squad-train-v1.1.json.xz")
    countries = [factbook_text(r) for r in read_jsonl(data / "text/factbook.jsonl.xz")]
    stories = [s["text"] for r in read_jsonl(data / "qa/fairytaleqa-train.jsonl.xz") for s in r.get("sections", [])]
    stories = list(dict.fromkeys(stories))
    squad_test = squad[ARTICLE_STRIDE - 1 :: ARTICLE_STRIDE]
    squad_train = [a for i, a in enumerate(squad) if i % ARTICLE_STRIDE != ARTICLE_STRIDE - 1]
    names = sorted(novels)
    test_novels = names[NOVEL_STRIDE - 1 :: NOVEL_STRIDE]
    train = {
        "textbooks": [t for n, t in books.items() if n != HELD_OUT_TEXTBOOK],
        "novels": [novels[n] for n in names if n not in test_novels],
        "squad": ["\n".join(p["text"] for p in a["passages"]) for a in squad_train],
        "factbook": [t for i, t in enumerate(countries) if i % COUNTRY_STRIDE != COUNTRY_STRIDE - 1],
        "stories": stories,
    }
    test = {"textbooks": [books[HELD_OUT_TEXTBOOK]], "novels": [novels[n] for n in test_novels]}
    return train, test, squad_train, squad_test


def make_tokenizer(train, fact_texts, vocab_size):
    """Byte-level BPE in the GPT-2 manner on a sample of the training text (and of the generated facts)."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    share = {"textbooks": 9e6, "novels": 6e6, "squad": 7e6, "factbook": 1e6, "stories": 1e6}

    def sample():
        for source, texts in train.items():
            per_text = int(share[source] / len(texts))
            for t in texts:
                yield t[:per_text]
        yield from fact_texts

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        sample(), trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    return tok


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("REFRAG_TEST_DATA"), help="folder of the corpora")
    parser.add_argument("--out", required=True)
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    if not args.data:
        parser.error("--data or REFRAG_TEST_DATA is needed")
    from .facts import FactMaker

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train, test, squad_train, squad_test = load(Path(args.data))
    maker, rng = FactMaker("train"), np.random.default_rng(7)
    facts = []
    for _ in range(3000):
        fact_passage = maker.passage(rng)
        facts.append(fact_passage["title"] + "\n" + fact_passage["text"] + "\n" + "\n".join(q + " " + a for q, a in fact_passage["qas"]))
    tok = make_tokenizer(train, facts, args.vocab_size)
    # Compact JSON: a third of the pretty-printed size, the same tokenizer.
    (out / "tokenizer.json").write_text(json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
    tok = Tokenizer.from_file(str(out / "tokenizer.json"))
    tok.encode_special_tokens = True
    for source, texts in train.items():
        ids = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tok.encode_batch(texts, add_special_tokens=False)])
        np.save(out / f"{source}.npy", ids)
        print(f"{source}: {len(texts)} texts, {sum(map(len, texts))} characters, {len(ids)} tokens", flush=True)
    for source, texts in test.items():
        share = 600_000 // len(texts)  # characters; from the middle of each book, past prefaces and tables of contents
        parts = [t[len(t) // 3 : len(t) // 3 + share].split("\n", 1)[-1] for t in texts]
        (out / f"heldout_{source}.txt").write_text("\n".join(parts), encoding="utf-8")
    (out / "squad_train.json").write_text(json.dumps(squad_train))
    (out / "heldout_squad.json").write_text(json.dumps(squad_test))


if __name__ == "__main__":
    main()
