"""Reads the public corpora into training, validation and test parts, by whole books, articles, countries and subjects, and
removes repeats.

A part is {"text": {source: [text, ...]}, "tasks": {kind: [passage, ...]}}; a passage is {"title", "text", "qas": [[question,
answer], ...]}. Repeats are removed twice: a paragraph (or a passage) that occurred before, letter for letter once case and
punctuation are gone, is dropped, and so is one that shares more than a third of its 13-word sequences with validation or
test text, or (outside novels) more than seven tenths with earlier training text.
"""
import hashlib
import html
import json
import lzma
import re
import tarfile
from pathlib import Path

TEST_TEXTBOOK = "astronomy.txt"
NO_ANSWER = "not in the passages"
SUMMARY_QUESTION = "What is this about, in one sentence?"
SHINGLE = 13


def part_of(name, validation_percent, test_percent):
    """train, validation or test, from a hash of the name of a whole unit."""
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if at < test_percent else "validation" if at < test_percent + validation_percent else "train"


def read_tar(path):
    """name -> text of every file in a .tar.xz, sorted by name."""
    with tarfile.open(path, "r:xz") as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        return {Path(m.name).name: tar.extractfile(m).read().decode("utf-8") for m in members}


def read_jsonl(path):
    with lzma.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def squad_articles(path):
    """[{title, passages: [{title, text, qas: [[question, answer]]}]}]; unanswerable questions (2.0) have the answer NO_ANSWER."""
    with lzma.open(path, "rt", encoding="utf-8") as f:
        data = json.load(f)["data"]
    out = []
    for a in data:
        title = a["title"].replace("_", " ")
        out.append({"title": title, "passages": [
            {"title": title, "text": p["context"].strip(),
             "qas": [[q["question"].strip(), q["answers"][0]["text"] if q["answers"] else NO_ANSWER] for q in p["qas"]]}
            for p in a["paragraphs"]]})
    return out


def first_sentences(text, limit):
    """As many whole sentences from the start as fit into `limit` characters; "" where the first is longer."""
    out = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        if len(out) + len(sentence) + 1 > limit:
            break
        out = f"{out} {sentence}".strip()
    return out


def medquad(path):
    """Passages about one medical subject each, question answered by the passage's first sentences."""
    for row in read_jsonl(path):
        answer = re.sub(r"[ \t]+", " ", row["answer"] or "").strip()
        short = first_sentences(answer.replace("Key Points", "").lstrip("\n -"), 200)
        if len(answer) < 120 or not short:
            continue
        question = re.sub(r"\s*\?+$", "?", row["question"].strip()).replace("What is (are)", "What is").strip()
        # Many answers begin with the question in other words.
        short = first_sentences(re.sub(r"^([^.!?]{0,200}\?\s+)+", "", answer.replace("Key Points", "").lstrip("\n -")), 200)
        yield row["focus"], {"title": row["focus"], "text": answer, "qas": [[question, short]] if short else []}


def fairytales(path):
    """(story, passage): one section a passage, with the questions asked about that section alone."""
    for row in read_jsonl(path):
        for section in row["sections"]:
            qas = [[q["question"].strip(), q["answers"][0].strip()] for q in row["qas"] if q["sections"] == section["section"] and q["answers"]]
            yield row["story"], {"title": row["story"], "text": section["text"].strip(), "qas": qas}


def clean_meeting(text):
    text = re.sub(r"\{[a-z]+\}", "", text)
    text = re.sub(r"\s+([.,?!;:'])", r"\1", text)
    return re.sub(r" +", " ", text).strip()


def meetings(path, limit=6000):
    """(transcript, passages): a query about a span of a meeting, the span as passage, `limit` characters at most."""
    for number, row in enumerate(read_jsonl(path)):
        turns = [f"{t['speaker']}: {clean_meeting(t['content'])}" for t in row["meeting_transcripts"]]
        passages = []
        for query in row["specific_query_list"]:
            spans = [turns[int(a) : int(b) + 1] for a, b in query["relevant_text_span"] if a.isdigit() and b.isdigit()]
            text = "\n".join(t for span in spans for t in span)
            if 200 < len(text) <= limit:
                passages.append({"title": "", "text": text, "qas": [[clean_meeting(query["query"]), clean_meeting(query["answer"])]]})
        yield f"meeting {number}", "\n".join(turns), passages


def abstracts(path):
    """Abstracts of papers with their one-sentence summaries."""
    for row in read_jsonl(path):
        yield {"title": "", "text": " ".join(row["source"]), "qas": [[SUMMARY_QUESTION, row["target"][0].strip()]]}


def factbook(path):
    """(country, {field: value}): values of one line, without footnotes."""
    for row in read_jsonl(path):
        fields = {}
        for name, value in row["fields"].items():
            value = html.unescape(re.sub(r"<[^>]+>", " ", value)).strip()
            fields[name] = re.sub(r"\s+", " ", value)
        yield row["country"], fields


def factbook_text(country, fields):
    return country + "\n" + "\n".join(f"{k.split(' / ')[-1].strip()}: {v}" for k, v in fields.items() if len(v) > 80)


def words(text):
    return re.findall(r"\w+", text.lower())


def shingles(text):
    w = words(text)
    return [hash(tuple(w[i : i + SHINGLE])) for i in range(0, len(w) - SHINGLE + 1)]


class Deduper:
    """Drops what was seen before; see the top of this file."""

    def __init__(self):
        self.held_out, self.seen, self.paragraphs, self.dropped = set(), set(), set(), {}

    def hold_out(self, text):
        self.held_out.update(shingles(text))

    def keeps(self, source, text, near=True):
        """Whether a training text is new; if so it counts as seen from now on."""
        key = " ".join(words(text))
        if len(key) >= 40:
            at = shingles(text)
            repeated = key in self.paragraphs
            if at and not repeated:
                repeated = sum(s in self.held_out for s in at) * 3 > len(at)
            if at and near and not repeated:
                repeated = sum(s in self.seen for s in at) * 10 > len(at) * 7
            if repeated:
                n, size = self.dropped.get(source, (0, 0))
                self.dropped[source] = (n + 1, size + len(text))
                return False
            self.paragraphs.add(key)
            if near:
                self.seen.update(at)
        return True

    def text(self, source, text, near=True):
        return "\n".join(line for line in text.split("\n") if self.keeps(source, line, near))


def load(data):
    """{"train", "validation", "test"}, and what was dropped as {source: (paragraphs, characters)}."""
    parts = {name: {"text": {}, "tasks": {}} for name in ("train", "validation", "test")}

    def add(part, what, source, value):
        parts[part][what].setdefault(source, []).append(value)

    for name, text in read_tar(data / "text/textbooks.tar.xz").items():
        add("test" if name == TEST_TEXTBOOK else "train", "text", "textbooks", text)
    for i, (name, text) in enumerate(read_tar(data / "text/novels.tar.xz").items()):
        add("test" if i % 15 == 14 else "validation" if i % 30 == 7 else "train", "text", "novels", text)
    for i, article in enumerate(squad_articles(data / "qa/squad-train-v1.1.json.xz")):
        part = "test" if i % 20 == 19 else "validation" if i % 40 == 9 else "train"
        for p in article["passages"]:
            add(part, "tasks", "squad", p)
    for i, (country, fields) in enumerate(factbook(data / "text/factbook.jsonl.xz")):
        part = "test" if i % 12 == 11 else "train"
        add(part, "text", "factbook", factbook_text(country, fields))
        add(part, "tasks", "factbook", {"title": country, "fields": fields})
    for row in read_jsonl(data / "qa/boolq-train.jsonl.xz"):
        question = row["question"].strip().rstrip("?") + "?"
        add(part_of(row["title"], 1, 5), "tasks", "boolq", {"title": row["title"], "text": row["passage"], "qas": [[question, row["answer"]]]})
    for subject, p in medquad(data / "qa/medquad.jsonl.xz"):
        add(part_of(subject.lower(), 1, 4), "tasks", "medquad", p)
    for name, part in (("train", "train"), ("val", "test")):
        for _, p in fairytales(data / f"qa/fairytaleqa-{name}.jsonl.xz"):
            add(part, "tasks", "fairytaleqa", p)
        for _, transcript, passages in meetings(data / f"qa/qmsum-{name}.jsonl.xz"):
            add(part, "text", "meetings", transcript)
            for p in passages:
                add(part, "tasks", "qmsum", p)
    for name, part in (("train", "train"), ("dev", "test")):
        for p in abstracts(data / f"qa/scitldr-{name}.jsonl.xz"):
            add(part, "tasks", "scitldr", p)
        for row in read_jsonl(data / f"qa/squality-{name}.jsonl.xz"):
            add(part, "text", "squality", re.sub(r"\s*\n\s*", "\n", row["document"]).strip())
    dropped = dedupe(parts, data)
    for part in parts.values():
        if "textbooks" in part["text"]:
            part["tasks"]["cloze"] = cloze_paragraphs(part["text"]["textbooks"])
    return parts, dropped


def cloze_paragraphs(textbooks):
    """The paragraphs of which questions with a word left out are made (tasks.Cloze)."""
    return [{"title": "", "text": line, "qas": []} for text in textbooks for line in text.split("\n") if 300 <= len(line) <= 1200]


def passage_text(passage):
    return f"{passage['title']}\n{passage['text']}" if passage["title"] else passage["text"]


def dedupe(parts, data):
    """Removes repeats in place; passages that stay become text as well. Returns what was dropped."""
    d = Deduper()
    for part in ("validation", "test"):
        for texts in parts[part]["text"].values():
            for t in texts:
                d.hold_out(t)
        for passages in parts[part]["tasks"].values():
            for p in passages:
                d.hold_out(p.get("text", ""))
    for name in ("squad-dev-v1.1.open", "squad-dev-v2.0.open"):
        for article in squad_articles(data / f"qa/{name}.json.xz"):
            for p in article["passages"]:
                d.hold_out(p["text"])
    train = parts["train"]
    text, tasks = train["text"], train["tasks"]
    for source in text:
        text[source] = [d.text(source, t, near=source != "novels") for t in text[source]]
    for kind in tasks:
        if kind == "factbook":
            continue
        by_text = {}
        for p in tasks[kind]:  # several questions on one passage are one passage
            by_text.setdefault(p["text"], {**p, "qas": []})["qas"] += p["qas"]
        tasks[kind] = list(by_text.values())
        if kind != "qmsum":  # its passages are parts of the transcripts
            tasks[kind] = [p for p in tasks[kind] if d.keeps(kind, p["text"])]
            text[kind] = [passage_text(p) for p in tasks[kind]]
    return d.dropped
