"""Makes tests/golden/tokenizers: what Hugging Face `tokenizers` says about texts, for tests/test_tokenizer.cpp.

    .venv/bin/python weights_tools/make_golden_tokenizers.py [--data DIR] [--real build/tokenizers]

Run it again after weights_tools/refrag-nano's vocabulary was retrained. --data (default: $REFRAG_TEST_DATA) is the
folder with RoBERTa's vocabulary and the texts that are not part of the repository; without it the goldens that need
it stay as they are. Strings are kept as hex, since many are not valid UTF-8; texts outside the repository by hash.

Files: strings.json (the strings), nano.json and roberta.json (their ids), texts.json (ids of the outside texts, hashed),
variants.json (tiny vocabularies with added tokens of every kind), char_classes.txt (\\p{L}, \\p{N}, \\s and \\w).

--real, for tests/test_real_tokenizers.cpp: a folder made by convert_tokenizer.py --all. real/texts.json names the texts (outside
ones by hash) and holds generated strings; real/FAMILY.json has their ids as counts, hashes and first ids; no part of a vocabulary.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import sys

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tokenizer_strings  # noqa: E402

FRAGMENTS = """'s 't 'll 'LL 've 're 'd 'm ' '' ’s don't I'LL we're 1st 3.14 1,000 a_b foo_bar CamelCase ... !? http://a.b/c?d=e
<s> </s> <pad> <unk> <mask> <s s> < > << <mask mask> </s <|x|> Ġ Ċ Ġthe ſ K ﬀ ² ½ Ⅷ ٣ १ 𝟘 é é ß İ æ ǅ ʰ 中文 日本語 かな 한국어
ไทย हिन्दी தமிழ் العربية עברית ქართული 👩‍👩‍👧 🇩🇪 ❤️ ☃ € ™ “quoted” – — … the quick brown fox Washington antidisestablishmentarianism""".split()
FRAGMENTS += ["'sa", "''s", " 's", " '", "a b", "<s> </s>", " <mask> ", "x <mask>\t", "\ufffd", "\ufeff"]
SPACES = [" ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u180e",
          "\u2000", "\u2003", "\u200b", "\u200d", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\x00", "\x7f"]
MALFORMED = ["80", "bf", "c0", "c0af", "c3", "c328", "e0", "e080", "e080af", "e282", "e28228", "eda080", "edbfbf", "f0",
             "f08080af", "f09f", "f09f98", "f09f9828", "f4908080", "f5", "f880808080", "ff", "fe", "fffe", "c3e282f09f98ff"]


def fnv1a(data: bytes) -> str:
    """64-bit FNV-1a, as in the C++ test."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def fnv_of_ids(ids: list[int]) -> str:
    return fnv1a(b"".join(i.to_bytes(4, "little") for i in ids))


def clean(data: bytes) -> str:
    """One U+FFFD per maximal invalid subpart."""
    return data.decode("utf-8", "replace")


def random_char(rng: random.Random) -> str:
    low, high = rng.choice([(0x20, 0x7F), (0x80, 0x250), (0x250, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)])
    return chr(rng.randrange(low, high))


def make_strings() -> list[bytes]:
    """Hand-made edges first, then strings from a fixed seed."""
    rng = random.Random(20240917)
    strings = ["", " ", "  ", "\n", " \n ", "a", " a", "a ", "  a  ", "Hello world", "Hello  world", "\n\nHello\n\n\nworld \n"]
    strings = [s.encode() for s in strings]
    strings += [bytes.fromhex(h) for h in MALFORMED] + [b"ab" + bytes.fromhex(h) + b"cd" for h in MALFORMED]
    strings += [(unit * n).encode() for unit in ("a", " ", "\n", "!", "中", "'", "\u00a0", "ab") for n in (2, 7, 49, 200)]
    strings += [bytes([b]) for b in range(256)]
    for _ in range(60):
        strings.append("".join(rng.choice(FRAGMENTS) + rng.choice(SPACES + [""] * 12) for _ in range(rng.randrange(1, 10))).encode())
    for _ in range(25):
        strings.append("".join(random_char(rng) for _ in range(rng.randrange(1, 25))).encode())
    for _ in range(25):
        strings.append("".join(rng.choice(SPACES + ["a", "1", ".", "é", "<s>"]) for _ in range(rng.randrange(1, 15))).encode())
    for _ in range(25):
        data = bytearray("".join(rng.choice(FRAGMENTS) for _ in range(4)).encode())
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        strings.append(bytes(data))
    return strings


class Reference:
    """One tokenizer.json in the three modes that refrag has."""

    def __init__(self, text: str):
        self.parsing = Tokenizer.from_str(text)
        self.plain = Tokenizer.from_str(text)
        self.plain.encode_special_tokens = True

    def ids(self, text: str) -> dict:
        """plain: special tokens are text. parsed: they are tokens. special: parsed, and the template around."""
        plain = self.plain.encode(text, add_special_tokens=False).ids
        parsed = self.parsing.encode(text, add_special_tokens=False).ids
        return {"plain": plain, "parsed": parsed, "special": self.parsing.encode(text).ids}


def ids_of_strings(reference: Reference, strings: list[bytes]) -> list:
    """[plain, parsed, special] for each string; null stands for the same as plain."""
    rows = []
    for data in strings:
        ids = reference.ids(clean(data))
        rows.append([ids["plain"]] + [None if ids[mode] == ids["plain"] else ids[mode] for mode in ("parsed", "special")])
    return rows


def decoding_cases(reference: Reference, seed: int) -> list:
    """Random ids, decoded with and without special tokens."""
    rng = random.Random(seed)
    size = reference.parsing.get_vocab_size()
    cases = []
    for _ in range(40):
        limit = rng.choice([260, 260, size])  # mostly among the single bytes
        ids = [rng.randrange(limit) for _ in range(rng.randrange(1, 20))]
        kept, skipped = (reference.parsing.decode(ids, skip_special_tokens=skip) for skip in (False, True))
        cases.append([ids, kept.encode().hex(), skipped.encode().hex()])
    return cases


def write(path: pathlib.Path, value) -> None:
    """JSON with one line for each element of a top-level list."""
    lines = []
    for key, item in value.items():
        if isinstance(item, list):
            body = ",\n".join(json.dumps(element, ensure_ascii=True, separators=(",", ":")) for element in item)
            lines.append(f"{json.dumps(key)}: [\n{body}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(item)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {path.stat().st_size} bytes")


def vocabulary_golden(text: str, strings: list[bytes], seed: int) -> dict:
    reference = Reference(text)
    return {
        "tokenizers": tokenizers.__version__,
        "vocabulary_fnv": fnv1a(text.encode()),
        "vocab_size": reference.parsing.get_vocab_size(),
        "ids": ids_of_strings(reference, strings),
        "decoding": decoding_cases(reference, seed),
    }


def text_rows(data: pathlib.Path, references: dict[str, Reference]) -> list:
    rows = []
    for path in sorted((data / "unicode" / "udhr").glob("*.txt")) + [data / "unicode" / "utf8tests.bin", data / "unicode" / "UTF-8-demo.txt"]:
        content = path.read_bytes()
        row = {"file": str(path.relative_to(data)), "bytes": len(content), "fnv": fnv1a(content), "clean_fnv": fnv1a(clean(content).encode())}
        for name, reference in references.items():
            ids = reference.ids(clean(content))
            row[name] = {mode: [len(ids[mode]), fnv_of_ids(ids[mode])] for mode in ids}
            row[name]["first"] = ids["plain"][:8]
        rows.append(row)
    return rows


N_FIRST = 64  # ids kept as they are; the rest is in the hash


def short_sha256(data: bytes) -> str:
    """The first 64 bits: what these goldens compare is wrong by accident, not by design."""
    return hashlib.sha256(data).hexdigest()[:16]


def summary(ids: list[int]) -> list:
    return [len(ids), short_sha256(b"".join(i.to_bytes(4, "little") for i in ids))]


def real_row(reference: Reference, data: bytes) -> list:
    """[plain count, plain hash, first plain ids, special count, special hash, hash of the plain ids' text]."""
    ids = reference.ids(clean(data))
    decoded = reference.parsing.decode(ids["plain"], skip_special_tokens=False)
    return summary(ids["plain"]) + [ids["plain"][:N_FIRST]] + summary(ids["special"]) + [short_sha256(decoded.encode())]


def generated(seed: int, count: int, spellings: list[str]) -> list[bytes]:
    """Strings of tokenizer_strings.py; with spellings, of added tokens alone."""
    maker = tokenizer_strings.Maker(seed, [], spellings)
    if spellings:
        maker.kinds = [maker.added]
    return [maker.next().encode() for _ in range(count)]


def real_goldens(data: pathlib.Path, real: pathlib.Path, out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(data.glob("unicode/udhr/*.txt")) + [data / "unicode" / "UTF-8-demo.txt", data / "unicode" / "utf8tests.bin"]
    texts = [path.read_bytes() for path in names]
    rng = random.Random(7)
    # Every plane below U+30000 and a few above, then the makers, then malformed UTF-8.
    strings = ["".join(chr(rng.randrange(low, low + 0x1000)) for _ in range(12)).encode() for low in range(0, 0x30000, 0x1000) if low != 0xD000]
    strings += ["".join(chr(rng.randrange(0x30000, 0x110000)) for _ in range(12)).encode() for _ in range(4)]
    strings += generated(8, 150, [])
    strings += [bytes.fromhex(h) + b" ab" + bytes.fromhex(h) for h in MALFORMED]
    rows = [{"file": str(path.relative_to(data)), "sha256": hashlib.sha256(text).hexdigest()} for path, text in zip(names, texts)]
    rows += [{"hex": string.hex()} for string in strings]
    write(out / "texts.json", {"texts": rows})
    for path in sorted(real.glob("*/tokenizer.json")):
        reference = Reference(path.read_text(encoding="utf-8"))
        spellings = [token["content"] for token in json.loads(reference.parsing.to_str())["added_tokens"]]
        own = generated(9, 40, spellings[:12] + spellings[-3:])
        cases = [[ids] + [short_sha256(text.encode()) for text in (bytes.fromhex(kept).decode(), bytes.fromhex(skipped).decode())]
                 for ids, kept, skipped in decoding_cases(reference, 10)]
        write(out / f"{path.parent.name}.json", {
            "tokenizers": tokenizers.__version__,
            "vocab_size": reference.parsing.get_vocab_size(),
            "template": reference.ids("")["special"],
            "rows": [real_row(reference, text) for text in texts + strings],
            "own": [[string.hex()] + real_row(reference, string) for string in own],
            "decoding": cases,
        })


def tiny_tokenizer(prefix_space: bool, use_regex: bool, post_processor) -> dict:
    """All 256 bytes and a few merges, as tokenizer.json's structure."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>"] + alphabet
    merges = []
    for merge in ("t h", "th e", "Ġ the", "Ġ a", "a a", "aa aa", "a b", "b c", "ab c", "a bc", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ã ©", "< s", "1 1"):
        left, right = merge.split(" ")
        if left + right not in pieces:
            pieces.append(left + right)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in pieces[:4]])
    structure = json.loads(tokenizer.to_str())
    structure["post_processor"] = post_processor
    return structure


def special(piece: str) -> dict:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


def variants() -> list:
    """Tiny vocabularies whose added tokens have every combination of flags, and every kind of template."""
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [2, 3], "tokens": ["</s>", "<unk>"]}}
    template = {"type": "TemplateProcessing", "single": [special("<s>"), sequence, special("</s>"), special("<s>")],
                "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": tokens}
    only_first = template | {"single": [special("<s>"), sequence]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": False}
    processors = [None, byte_level, roberta, template, {"type": "Sequence", "processors": [byte_level, only_first]},
                  {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}]
    contents = ["<a>", "<ab>", "ab", "abc", "the", "th", "<s", "s>", "<<", "é", "中", "don't", "a b", "</s><s>", "1", ">", "'s", "_w_", " the"]
    rng = random.Random(4)
    cases = []
    for index, processor in enumerate(processors):
        structure = tiny_tokenizer(index % 2 == 0, index % 3 != 2, processor)
        vocab = structure["model"]["vocab"]
        next_id = len(vocab)
        for token in structure["added_tokens"]:
            for flag in ("lstrip", "rstrip", "single_word", "normalized"):
                token[flag] = rng.random() < 0.3
        for content in rng.sample(contents, 9):
            token = {"id": vocab.get(content, next_id), "content": content}
            next_id += content not in vocab
            for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
                token[flag] = rng.random() < 0.4
            structure["added_tokens"].append(token)
        text = json.dumps(structure, ensure_ascii=False)
        reference = Reference(text)
        parts = contents + FRAGMENTS[:12] + SPACES[:12] + ["aaaa", "abcabc", "the", " ", "<s>", "</s>", "_", "é", "x"]
        strings = ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 12))).encode() for _ in range(60)]
        strings += [bytes.fromhex(h) + b"<a>" + bytes.fromhex(h) for h in MALFORMED[:8]]
        cases.append({"tokenizer": text, "strings": [s.hex() for s in strings], "ids": ids_of_strings(reference, strings)})
    return cases


def char_classes() -> str:
    """Ranges of code points by class: L, N, S (the rest is 'other'), and W for what touches a word."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Tokenizer(models.BPE(vocab={}, merges=[]))
    words.add_tokens([AddedToken("#T#", single_word=True, normalized=False)])

    def joins(left: str, right: str) -> bool:
        return len(byte_level.pre_tokenize_str(left + right)) == 1

    lines = ["# First and last code point and class, from tokenizers " + tokenizers.__version__]
    runs: dict[str, list[list[int]]] = {"L": [], "N": [], "S": [], "W": []}
    for code in range(0x110000):
        if 0xD800 <= code <= 0xDFFF:
            continue
        char = chr(code)
        found = "L" if joins("a", char) else "N" if joins("1", char) else "" if joins("!", char) else "S"
        if not words.encode(char + "#T#").ids:
            found += "W"
        for cls in found:
            if runs[cls] and runs[cls][-1][1] == code - 1:
                runs[cls][-1][1] = code
            else:
                runs[cls].append([code, code])
    lines += [f"{first:x} {last:x} {cls}" for cls in "LNSW" for first, last in runs[cls]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", default="weights_tools/refrag-nano/decoder/tokenizer.json")
    parser.add_argument("--data", default=os.environ.get("REFRAG_TEST_DATA", ""))
    parser.add_argument("--real", help="folder of real tokenizers: make their goldens and no others")
    parser.add_argument("--out", default="tests/golden/tokenizers")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.real:
        if not arguments.data:
            parser.error("--real needs --data")
        return real_goldens(pathlib.Path(arguments.data), pathlib.Path(arguments.real), out / "real")

    strings = make_strings()
    write(out / "strings.json", {"strings": [s.hex() for s in strings]})
    nano = pathlib.Path(arguments.nano).read_text()
    write(out / "nano.json", vocabulary_golden(nano, strings, 1))
    write(out / "variants.json", {"variants": variants()})
    (out / "char_classes.txt").write_text(char_classes())
    if not arguments.data:
        print("no --data: roberta.json and texts.json are left as they are")
        return
    data = pathlib.Path(arguments.data)
    roberta = (data / "tokenizers" / "roberta-base" / "tokenizer.json").read_text()
    write(out / "roberta.json", vocabulary_golden(roberta, strings, 2))
    write(out / "texts.json", {"texts": text_rows(data, {"nano": Reference(nano), "roberta": Reference(roberta)})})


if __name__ == "__main__":
    main()
