"""Makes tests/golden/tokenizers/steps.json and normal_forms.txt: what Hugging Face `tokenizers` makes of every step of a
tokenizer.json, one small vocabulary a step, and of Unicode normalisation.

    .venv/bin/python weights_tools/make_golden_tokenizer_steps.py

steps.json: [{"tokenizer", "strings", "ids", "decoding"}, ..]; strings as hex; ids as [plain, parsed, special] (null: as plain);
decoding as [ids, text, text without special tokens], texts as hex.
normal_forms.txt: a line "FORM FIRST LAST HASH" a block of 4096 code points: the FNV-1a of, for every code point c, the
form of c, of "a" U+0345 c U+0334, of c U+0301 and of U+1100 c U+11A8, each ended by a zero byte.
"""

import itertools
import json
import pathlib
import random

from make_golden_tokenizers import clean, fnv1a
from tokenizers import Tokenizer, normalizers

SPACE = "▁"
WORDS = ["the", "they", "here", "hi", "a", "ab", "abc", SPACE + "a", SPACE + "the", SPACE * 2, SPACE * 4, "-a", "11", "ée", "中文", "  "]


def vocabulary(with_bytes: bool) -> tuple[dict, list]:
    """Characters and merges of a vocabulary in SentencePiece's manner."""
    pieces = ["<unk>", "<s>", "</s>"]
    if with_bytes:
        pieces += [f"<0x{byte:02X}>" for byte in range(256) if byte != 0xBF]  # a hole: some characters stay unknown
    pieces += sorted(set("".join(WORDS) + SPACE + " .-_0123" + "éàü"))
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append([word[: end - 1], word[end - 1]])
    return {piece: i for i, piece in enumerate(pieces)}, merges


def byte_alphabet() -> list[str]:
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in own]
    return [chr(b) if b in own else chr(256 + rest.index(b)) for b in range(256)]


def added(n: int, normalized: bool) -> list:
    def token(content, id, **flags):
        entry = {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized,
                 "special": True}
        return entry | flags

    return [token("<unk>", 0), token("<s>", 1), token("</s>", 2), token("<m>", n, lstrip=True), token("é e", n + 1, special=False),
            token("<r>", n + 2, rstrip=True, special=False), token("wo", n + 3, single_word=True, special=False)]


def tokenizer(normalizer=None, pre_tokenizer=None, decoder=None, normalized=False, with_bytes=True, ids=None, **model) -> dict:
    vocab, merges = vocabulary(with_bytes)
    if ids is not None:
        vocab, merges = ids
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | model
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added(len(vocab), normalized), "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": template, "decoder": decoder,
            "model": model | {"vocab": vocab, "merges": merges}}


def sequence(key: str, *steps) -> dict:
    return {"type": "Sequence", key: list(steps)}


def replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(pattern: str, behavior: str) -> dict:
    return {"type": "Split", "pattern": {"String": pattern}, "behavior": behavior, "invert": False}


def variants() -> list[dict]:
    llama = sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, replace(" ", SPACE))
    llama_decoder = sequence("decoders", replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                             {"type": "Strip", "content": " ", "start": 1, "stop": 0})
    out = [tokenizer(llama, None, llama_decoder, normalized, byte_fallback=True, fuse_unk=fuse)
           for normalized in (False, True) for fuse in (False, True)]
    out.append(tokenizer(llama, None, sequence("decoders", replace(SPACE, "_"), replace("_", " "), {"type": "Fuse"},
                                               {"type": "Strip", "content": " ", "start": 3, "stop": 0})))
    out.append(tokenizer(llama, None, sequence("decoders", {"type": "ByteFallback"}), byte_fallback=True))
    for scheme, cuts in itertools.product(("always", "first", "never"), (True, False)):
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": cuts}
        out.append(tokenizer(None, metaspace, metaspace, fuse_unk=cuts))
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    out.append(tokenizer({"type": "Strip", "strip_left": True, "strip_right": False}, first, first, normalized=True))
    out.append(tokenizer({"type": "Prepend", "prepend": "-"}, sequence("pretokenizers", split("-", "Isolated"), first), None))
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        out.append(tokenizer(None, split("-", behavior), None, unk_token=None))
    out.append(tokenizer(None, split("the", "Isolated"), None, ignore_merges=True))
    for individual in (True, False):
        out.append(tokenizer(None, {"type": "Digits", "individual_digits": individual}, None, byte_fallback=True))
    out.append(tokenizer({"type": "Strip", "strip_left": True, "strip_right": True}, None, None, unk_token=None))
    out += [tokenizer({"type": form}, None, None, True, byte_fallback=True) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    alphabet = byte_alphabet()
    pieces = ["<unk>", "<s>", "</s>", *alphabet, "th", "the", "Ġt", "Ġthe", "Ġa", "ĠĠ", "ab", "11", "1111", "abc"]
    merges = [["t", "h"], ["th", "e"], ["Ġ", "t"], ["Ġ", "the"], ["Ġ", "a"], ["Ġ", "Ġ"], ["a", "b"], ["1", "1"], ["11", "11"]]
    whole = {piece: i for i, piece in enumerate(pieces)}
    few = {piece: i for i, piece in enumerate(p for p in pieces if p not in (alphabet[0xA9], alphabet[ord("x")]))}
    bytes_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    cl100k = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    inverted = {"type": "Split", "pattern": {"Regex": cl100k}, "behavior": "Removed", "invert": True}
    isolated = {"type": "Split", "pattern": {"Regex": cl100k.replace("{1,3}", "")}, "behavior": "Isolated", "invert": False}
    no_regex = bytes_level | {"use_regex": False, "add_prefix_space": False}
    for steps in ([digits, bytes_level], [inverted, no_regex], [isolated, no_regex], [isolated, no_regex | {"add_prefix_space": True}]):
        for ignore in (False, True):
            out.append(tokenizer(None, sequence("pretokenizers", *steps), decoder, ids=(whole, merges), ignore_merges=ignore))
    for fuse, unk in ((False, "<unk>"), (True, "<unk>"), (False, None)):
        out.append(tokenizer(None, bytes_level, decoder, ids=(few, merges), fuse_unk=fuse, unk_token=unk))
    return out


FRAGMENTS = ["the", "they", "here", "hi", "a", "ab", "abc", "A", " ", "  ", "   ", "\n", "\r\n", "\t", SPACE, SPACE * 2, "-", "--", "_", ".",
             "1", "11", "12345", "²", "x", "xx", "wo", "é", "é e", "e\u0301", "ée", "中文", "中", "ﬁ", "가\u11a8", "\u1100\u1161", "\u0958", "\u2126",
             "\u0323\u0301", "<s>", "</s>", "<unk>", "<m>", "<r>", "<s", "<0x41>", "\u3000", "\x00", "'s", "'S", "'ſ", "😀", "\ufffd", "ÿ"]
EDGES = ["", " ", "  ", SPACE, "-", "--", "a", " a", "a ", " a ", "-a", "a-", "a--a", "<s>", "<s>a", " <s>a", "a<s> b", "a <m>", "<r>  a",
         "the<s>the", "xyz", "xéyz", "wo", "awo", "wo wo", "éÿé", "中ÿ中", "  <m>  <r>  ", "<0xE4>", "ab ab  ab   ab    ab"]


def strings(rng: random.Random) -> list[bytes]:
    texts = [text.encode() for text in EDGES]
    while len(texts) < 60:
        texts.append("".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 9))).encode())
    texts += [b"\xff", b"a\xe4\xb8", b"\xc3 a\xf0\x9f\x98", ("ab " * 40).encode(), ("the" * 60).encode(), "中".encode() * 70]
    return texts


def case(tokenizer_json: dict, rng: random.Random) -> dict:
    text = json.dumps(tokenizer_json, ensure_ascii=False)
    parsing = Tokenizer.from_str(text)
    plain = Tokenizer.from_str(text)
    plain.encode_special_tokens = True
    texts = strings(rng)
    rows = []
    for data in texts:
        one = clean(data)
        ids = [plain.encode(one, add_special_tokens=False).ids, parsing.encode(one, add_special_tokens=False).ids, parsing.encode(one).ids]
        rows.append([ids[0]] + [None if i == ids[0] else i for i in ids[1:]])
    n = parsing.get_vocab_size()
    lists = [[], [1], [1, 2], *([rng.randrange(n) for _ in range(rng.randrange(1, 9))] for _ in range(25))]
    lists += [parsing.encode(clean(data)).ids for data in rng.sample(texts, 15)]
    as_bytes = [i for i in (parsing.token_to_id(f"<0x{b:02X}>") for b in "é中😀".encode() + b"\xff") if i is not None]
    lists += [rng.choices(as_bytes + [1, 5], k=rng.randrange(1, 7)) for _ in range(25 if as_bytes else 0)]
    if as_bytes:
        lists += [[as_bytes[0], as_bytes[1], 1, as_bytes[0]], as_bytes[:9], as_bytes]
    decoding = [[ids] + [parsing.decode(ids, skip_special_tokens=skip).encode().hex() for skip in (False, True)] for ids in lists]
    return {"tokenizer": text, "strings": [data.hex() for data in texts], "ids": rows, "decoding": decoding}


def normal_forms() -> str:
    lines = ["# see weights_tools/make_golden_tokenizer_steps.py"]
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        normalize = getattr(normalizers, form)().normalize_str
        for first in range(0, 0x110000, 4096):
            data = b""
            for code in range(first, first + 4096):
                if not 0xD800 <= code < 0xE000:
                    c = chr(code)
                    data += b"".join(normalize(text).encode() + b"\0" for text in (c, "a\u0345" + c + "\u0334", c + "\u0301", "\u1100" + c + "\u11a8"))
            lines.append(f"{form} {first:X} {first + 4095:X} {fnv1a(data)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    out = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizers"
    rng = random.Random(20241117)
    cases = [case(variant, rng) for variant in variants()]
    rows = ",\n".join(json.dumps(one, ensure_ascii=True, separators=(",", ":")) for one in cases)
    (out / "steps.json").write_text('{"cases":[\n' + rows + "\n]}\n")
    (out / "normal_forms.txt").write_text(normal_forms())
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
