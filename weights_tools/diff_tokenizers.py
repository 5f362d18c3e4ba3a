"""The differential test of the tokenizers: `refrag tokenize` against Hugging Face `tokenizers`, string by string.

    .venv/bin/python weights_tools/diff_tokenizers.py --refrag build/refrag --tokenizers build/tokenizers --count 1000000

For each family (a directory with a tokenizer.json; where a tokenizer.gguf is beside it, the binary reads that one) `--count`
strings of tokenizer_strings.py, all in three modes: plain (special tokens are text, no template), special (they are tokens,
with the template), decode (the plain ids back to text).
Then words of ten to seventy thousand characters (one for every 3000 strings), random id lists, with special tokens shown and
skipped, and files of malformed UTF-8. Prints a table row for each family and mode and the first ten mismatches made short;
exit code 1 where there is any. `bench/record.sh NAME` before the command keeps its output in bench/results/.

With --sources no binary is run: the converted files are compared with what they were made from (below tokenizers/ of the data
folder), by the packages `tiktoken` and `sentencepiece`.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
import unicodedata

os.environ.setdefault("RAYON_NUM_THREADS", "1")
import tokenizers  # noqa: E402  (the line above must come first)
from tokenizers import Tokenizer  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tokenizer_strings  # noqa: E402

CHUNK = 100_000
SHOWN = 10
MALFORMED = ["80", "bf", "c0", "c0af", "c3", "c328", "e0", "e080", "e080af", "e282", "e28228", "eda080", "edbfbf", "f0", "f08080af", "f09f",
             "f09f98", "f09f9828", "f4908080", "f5", "f880808080", "ff", "fe", "fffe", "c3e282f09f98ff"]


class Reference:
    """One tokenizer.json in the reference library."""

    def __init__(self, path: pathlib.Path):
        self.text = path.read_text(encoding="utf-8")
        self.parsing = Tokenizer.from_str(self.text)
        self.plain = Tokenizer.from_str(self.text)
        self.plain.encode_special_tokens = True
        self.spellings = [token["content"] for token in json.loads(self.text)["added_tokens"]]
        self.size = self.parsing.get_vocab_size()

    def encode(self, mode: str, strings: list) -> list:
        tokenizer = self.plain if mode == "plain" else self.parsing
        return [found.ids for found in tokenizer.encode_batch_fast(strings, add_special_tokens=mode == "special")]

    def decode(self, mode: str, ids: list) -> list:
        return self.parsing.decode_batch(ids, skip_special_tokens=mode == "skip")

    def piece(self, rng: random.Random) -> str:
        return self.parsing.decode([rng.randrange(self.size)], skip_special_tokens=False)


class Refrag:
    """The same questions to the binary; `start` begins a run so that the reference can work meanwhile."""

    def __init__(self, binary: str, tokenizer: pathlib.Path):
        self.command = [binary, "tokenize", "--tokenizer", str(tokenizer)]

    def start(self, mode: str, rows: list):
        flags = {"plain": ["--batch"], "special": ["--batch", "--special"], "show": ["--batch-decode", "--special"], "skip": ["--batch-decode"]}[mode]
        source, out = tempfile.NamedTemporaryFile("w", suffix=".jsonl"), tempfile.TemporaryFile()
        source.write("".join([json.dumps(row) + "\n" for row in rows]))
        source.flush()
        process = subprocess.Popen(self.command + flags + ["--file", source.name], stdout=out, stderr=subprocess.PIPE)
        return process, source, out, mode, len(rows)

    def finish(self, run) -> list:
        """Lists of ids, or texts."""
        process, source, out, mode, count = run
        message = process.stderr.read().decode("utf-8", "replace").strip()
        process.stderr.close()
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(self.command)}: exit code {process.returncode}: {message}")
        out.seek(0)
        lines = out.read().splitlines()
        source.close()
        out.close()
        if len(lines) != count:
            raise SystemExit(f"{' '.join(self.command)}: expected {count} lines, found {len(lines)}")
        return [json.loads(line)["ids" if mode in ("plain", "special") else "text"] for line in lines]

    def ask(self, mode: str, rows: list) -> list:
        return self.finish(self.start(mode, rows))

    def file_ids(self, path: str, special: bool) -> list:
        done = subprocess.run(self.command + ["--file", path, "--json"] + ["--special"] * special, capture_output=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(self.command)} --file: exit code {done.returncode}: {done.stderr.decode('utf-8', 'replace').strip()}")
        found = json.loads(done.stdout)
        return found["ids"], found["offsets"]


def minimise(row, still_wrong) -> str:
    """A short string or id list that is still wrong: cut out halves, then quarters, down to single elements."""
    size = max(len(row) // 2, 1)
    for _ in range(60):
        shorter = [row[:at] + row[at + size:] for at in range(0, len(row), size)][:512]
        wrong = still_wrong([one for one in shorter if len(one) > 0])
        if wrong:
            row = min(wrong, key=len)
            size = max(min(size, len(row) // 2), 1)
        elif size > 1:
            size //= 2
        else:
            break
    return row


class Tally:
    """Counts of one family and mode, with its first mismatches."""

    def __init__(self, family: str, mode: str, ask, expect):
        self.family, self.mode, self.ask, self.expect = family, mode, ask, expect
        self.count = self.n_wrong = 0
        self.seconds = 0.0
        self.examples = []

    def add(self, rows: list, found: list, expected: list) -> None:
        self.count += len(rows)
        for row, one, other in zip(rows, found, expected):
            if one != other:
                self.n_wrong += 1
                if len(self.examples) < SHOWN:
                    self.examples.append(row)

    def report(self, label: str = "strings") -> int:
        print(f"{self.family:18} {self.mode:8} {label:8} {self.count:9d}  mismatches {self.n_wrong:7d}  {self.seconds:7.1f} s", flush=True)

        def still_wrong(rows):
            return [row for row, one, other in zip(rows, self.ask(rows), self.expect(rows)) if one != other] if rows else []
        shown = set()
        for row in self.examples:
            short = minimise(row, still_wrong)
            if str(short) in shown:
                continue
            shown.add(str(short))
            print(f"    {ascii(short)}: expected {ascii(self.expect([short])[0])}, found {ascii(self.ask([short])[0])}", flush=True)
        return self.n_wrong


def chunks(iterator, size: int):
    iterator = iter(iterator)
    while True:
        rows = list(itertools.islice(iterator, size))
        if not rows:
            return
        yield rows


def random_ids(reference: Reference, count: int, seed: int):
    rng = random.Random(seed)
    special = [reference.parsing.token_to_id(spelling) for spelling in reference.spellings]
    for _ in range(count):
        limit = rng.choice([260, 520, reference.size, reference.size])  # half mostly among the single bytes
        yield [rng.choice(special) if special and rng.random() < 0.1 else rng.randrange(limit) for _ in range(rng.randint(1, 16))]


def malformed_files(texts: list, seed: int) -> list:
    rng = random.Random(seed)
    bad = [bytes.fromhex(one) for one in MALFORMED]
    files = [b"".join(bad), b" ".join(bad), b"ab".join(bad), b"\n".join(bad), b"1".join(bad), bytes(range(256)) * 3]
    for _ in range(26):
        text = rng.choice(texts) if texts else "".join(rng.choices(tokenizer_strings.WORDS, k=300))
        data = bytearray(text[:4000].encode())
        for _ in range(rng.randint(1, 400)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                data[at:at + rng.randint(0, 2)] = rng.choice(bad)
        files.append(bytes(data))
    return files


def check_files(name: str, reference: Reference, refrag: Refrag, texts: list, seed: int) -> int:
    """Ids of malformed UTF-8 are those of the text with U+FFFD for each maximal invalid subpart; spans tile the bytes."""
    begun, n_wrong = time.monotonic(), 0
    files = malformed_files(texts, seed)
    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(files):
            path = os.path.join(folder, str(index))
            pathlib.Path(path).write_bytes(data)
            ids, spans = refrag.file_ids(path, False)
            ends = [0] + [end for _, end in spans]
            tiled = all(begin == before for (begin, _), before in zip(spans, ends)) and ends[-1] == len(data)
            right = ids == reference.encode("plain", [data.decode("utf-8", "replace")])[0]
            if not (tiled and right):
                n_wrong += 1
                print(f"    malformed file {index}: {'ids differ' if not right else 'spans do not tile'}: {data[:60]!r}...")
    print(f"{name:18} {'plain':8} {'files':8} {len(files):9d}  mismatches {n_wrong:7d}  {time.monotonic() - begun:7.1f} s", flush=True)
    return n_wrong


def check_family(name: str, folder: pathlib.Path, options, texts: list) -> int:
    asked = folder / ("tokenizer.gguf" if (folder / "tokenizer.gguf").exists() else "tokenizer.json")
    reference, refrag = Reference(folder / "tokenizer.json"), Refrag(options.refrag, asked)

    def tally(mode):
        expect = reference.encode if mode in ("plain", "special") else reference.decode
        return Tally(name, mode, lambda rows: refrag.ask(mode, rows), lambda rows: expect(mode, rows))
    plain, special, decode = tally("plain"), tally("special"), tally("show")
    source = tokenizer_strings.strings(options.count, options.seed, texts, reference.spellings, reference.piece)
    for rows in chunks(source, CHUNK):
        ids = None
        for one in (plain, special, decode):
            begun = time.monotonic()
            given = ids if one is decode else rows
            run = refrag.start(one.mode, given)
            expected = one.expect(given)
            if one is plain:
                ids = expected
            one.add(given, refrag.finish(run), expected)
            one.seconds += time.monotonic() - begun
    n_wrong = plain.report() + special.report() + decode.report("ids of")
    long = tally("plain")
    for rows in chunks(tokenizer_strings.long_words(options.count // 3000, options.seed, reference.piece), 50):
        begun = time.monotonic()
        long.add(rows, refrag.ask("plain", rows), reference.encode("plain", rows))
        long.seconds += time.monotonic() - begun
    n_wrong += long.report("long")
    for mode in ("show", "skip"):
        lists = tally(mode)
        for rows in chunks(random_ids(reference, options.count // 5, options.seed), CHUNK):
            begun = time.monotonic()
            lists.add(rows, refrag.ask(mode, rows), reference.decode(mode, rows))
            lists.seconds += time.monotonic() - begun
        n_wrong += lists.report("id lists")
    return n_wrong + check_files(name, reference, refrag, texts, options.seed)


def source_encoder(name: str, sources: pathlib.Path, reference: Reference):
    """What the converted file was made from, as a function from strings to ids; None for a family that was copied."""
    if name in ("llama3", "qwen2.5", "qwen3"):
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
        path = sources / ("llama3/tokenizer.model" if name == "llama3" else "qwen/qwen.tiktoken")
        cut = json.loads(reference.text)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        encoding = tiktoken.Encoding(name, pat_str=cut, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={})
        # NFC is the reference's own, since Python's knows another Unicode version.
        form = (lambda text: text) if name == "llama3" else reference.parsing.normalizer.normalize_str
        return lambda strings: [encoding.encode_ordinary(form(text)) for text in strings], f"tiktoken {tiktoken.__version__}"
    if name in ("llama2", "llama2-metaspace"):
        import sentencepiece
        model = sentencepiece.SentencePieceProcessor(model_file=str(sources / "llama2" / "tokenizer.model"))
        return model.encode, f"sentencepiece {sentencepiece.__version__}"
    return None


def check_source(name: str, folder: pathlib.Path, options, texts: list) -> int:
    reference = Reference(folder / "tokenizer.json")
    found = source_encoder(name, pathlib.Path(options.data) / "tokenizers", reference)
    if found is None:
        return 0
    encode, package = found
    # The sources know no added tokens: without them the reference does not either.
    bare = json.loads(reference.text)
    bare["added_tokens"], bare["post_processor"] = [], None
    bare = Tokenizer.from_str(json.dumps(bare))

    def expect(rows):
        return [one.ids for one in bare.encode_batch_fast(rows, add_special_tokens=False)]
    tally = Tally(name, "plain", encode, expect)
    for rows in chunks(tokenizer_strings.strings(options.count, options.seed, texts, reference.spellings, reference.piece), CHUNK):
        begun = time.monotonic()
        if name == "llama2-metaspace":  # Metaspace adds no space before one that is there; SentencePiece always does
            rows = [row for row in rows if row[:1] not in (" ", "\u2581")]
        tally.add(rows, encode(rows), expect(rows))
        tally.seconds += time.monotonic() - begun
    print(f"against {package}:")
    return tally.report()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refrag", default="build/refrag", help="the binary")
    parser.add_argument("--tokenizers", default="build/tokenizers", help="directories with a tokenizer.json (made by convert_tokenizer.py --all)")
    parser.add_argument("--family", action="append", help="only this one; may be repeated")
    parser.add_argument("--count", type=int, default=1_000_000, help="strings a family")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", default=os.environ.get("REFRAG_TEST_DATA", ""), help="folder with texts and sources (default: $REFRAG_TEST_DATA)")
    parser.add_argument("--sources", action="store_true", help="compare the reference with what the files were converted from")
    options = parser.parse_args()
    root = pathlib.Path(options.tokenizers)
    names = options.family or sorted(path.parent.name for path in root.glob("*/tokenizer.json"))
    if not names:
        parser.error(f"{root}: expected directories with a tokenizer.json, found none")
    if options.sources and not options.data:
        parser.error("--sources needs --data")
    texts = tokenizer_strings.load_texts(pathlib.Path(options.data)) if options.data else []
    version = "" if options.sources else subprocess.run([options.refrag, "--version"], capture_output=True, text=True, check=True).stdout.strip() + ", "
    print(f"{version}tokenizers {tokenizers.__version__}, Python {platform.python_version()} (Unicode {unicodedata.unidata_version}); seed {options.seed}; "
          f"{len(tokenizer_strings.LISTED)} code points below U+30000 in three strings each, then generated strings from {len(texts)} texts "
          f"and makers in tokenizer_strings.py", flush=True)
    check = check_source if options.sources else check_family
    n_wrong = sum(check(name, root / name, options, texts) for name in names)
    print(f"all: {n_wrong} mismatches")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
