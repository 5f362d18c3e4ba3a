#!/usr/bin/env python3
"""Writes Hugging Face's tokenizer.json from the files in which tokenizers are first published.

    python3 weights_tools/convert_tokenizer.py llama3 tokenizer.model --out DIR
    python3 weights_tools/convert_tokenizer.py qwen3 qwen.tiktoken --config tokenizer_config.json --out DIR
    python3 weights_tools/convert_tokenizer.py sentencepiece tokenizer.model --out DIR
    python3 weights_tools/convert_tokenizer.py --all TOKENIZERS_DIR --out build/tokenizers

Needs Python 3.8 and nothing else. tiktoken ranks and SentencePiece's BPE models are read; a unigram model, or a
SentencePiece normalizer that rewrites text, is refused by name. A rank (or score) says when two neighbours are joined, a
tokenizer.json says which two: see recover_merges. Exit codes: 0 done, 1 failed at run time, 2 wrong usage, 3 bad input.
"""

import argparse
import base64
import binascii
import json
import os
import struct
import sys
import tempfile

MAX_FILE_BYTES = 1 << 28
FAMILIES = ("llama3", "qwen2", "qwen3", "sentencepiece")

# Where text is cut before BPE; LLaMA-3 takes up to three digits together, Qwen one.
CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
       r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_CUT = CUT.replace("DIGITS", "{1,3}")
QWEN_CUT = CUT.replace("DIGITS", "")
LLAMA3_RANKS = 128000
N_LLAMA3_SPECIAL = 256
SPACE = "\u2581"  # how SentencePiece spells a space


class BadInput(Exception):
    """An input file that cannot be converted; the message is one line naming file, place, expected and found."""


class WrongUsage(Exception):
    """The command line asks for something that cannot be."""


def read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadInput(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found more")
    return data


def write(path: str, text: str) -> None:
    """The whole file or nothing."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def recover_merges(rank: dict) -> list:
    """The pairs (left, right) that make each piece of `rank` (str or bytes -> priority, lower first), in rank order.

    Both tiktoken and SentencePiece join, of all neighbours whose concatenation is a piece, those with the best rank first, the
    leftmost of equals. Each piece is tokenised alone by that rule; the last two parts are its pair. One pair a
    piece is enough: were two parts joined to a piece inside a longer text, nothing has crossed their borders before,
    so inside them everything went as in the piece alone. A piece which the rule does not reach has no pair; it
    can come from text only where whole words are looked up first (ignore_merges).
    """
    found = []
    for piece, own in rank.items():
        parts = [piece[i:i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            best, at = None, -1
            for i in range(len(parts) - 1):
                candidate = rank.get(parts[i] + parts[i + 1])
                if candidate is not None and (best is None or candidate < best):
                    best, at = candidate, i
            if best is None:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append((own, parts[0], parts[1]))
    found.sort(key=lambda entry: entry[0])
    return [(left, right) for _, left, right in found]


def byte_alphabet() -> list:
    """The printable character that spells each byte: printable Latin-1 is itself, the rest U+0100, U+0101, ..."""
    printable = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def added(token_id: int, content: str, special: bool, flags: dict = None) -> dict:
    token = {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token.update(flags or {})
    token["special"] = special
    return token


def bos_template(bos: str, bos_id: int) -> dict:
    """A post-processor that puts the beginning-of-sequence token first."""
    def special(kind):
        return {"SpecialToken": {"id": bos, "type_id": kind}}

    def text(name, kind):
        return {"Sequence": {"id": name, "type_id": kind}}
    return {"type": "TemplateProcessing", "single": [special(0), text("A", 0)],
            "pair": [special(0), text("A", 0), special(1), text("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex}


def bpe(vocab: dict, merges: list, **settings) -> dict:
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model.update(settings)
    # Pairs, not "left right" lines: those cannot spell a piece with a space, nor one that begins with #version.
    model.update(vocab=vocab, merges=[list(pair) for pair in merges])
    return model


def structure(added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model) -> dict:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model}


# ---- tiktoken ranks -------------------------------------------------------------------------------------------------

def read_ranks(path: str) -> dict:
    """bytes -> rank. Ranks must be 0, 1, ... without a gap, and every single byte must have one."""
    ranks = {}
    for number, line in enumerate(read(path).splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split()
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
            if len(fields) != 2 or not token:
                raise ValueError
        except (ValueError, IndexError, binascii.Error):
            shown = ascii(line[:40])[1:]
            raise BadInput(f"{path}: line {number}: expected a token in base64 and its rank, found {shown}") from None
        if token in ranks:
            raise BadInput(f"{path}: line {number}: expected each token once, found {token!r} again")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise BadInput(f"{path}: expected the ranks 0 to {len(ranks) - 1}, each once, found others")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise BadInput(f"{path}: expected a rank for each of the 256 bytes, found none for {byte}")
    return ranks


def byte_level_bpe(ranks: dict, **settings) -> dict:
    alphabet = byte_alphabet()

    def spell(token):
        return "".join([alphabet[byte] for byte in token])
    ordered = dict(sorted(ranks.items(), key=lambda item: item[1]))
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ordered)]
    return bpe({spell(token): rank for token, rank in ordered.items()}, merges, **settings)


def isolated_split(pattern: str, trim_offsets: bool) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False, trim_offsets, False)]}


def llama3_special(version: str) -> list:
    """The 256 special tokens after the ranks; 3.1 (and 3.2, 3.3) gave names to four that 3 had reserved."""
    def reserved(number):
        return f"<|reserved_special_token_{number}|>"
    names = ["<|begin_of_text|>", "<|end_of_text|>", reserved(0), reserved(1)]
    if version == "3":
        names += [reserved(2), reserved(3), "<|start_header_id|>", "<|end_header_id|>", reserved(4), "<|eot_id|>"]
        first = 5
    else:
        names += ["<|finetune_right_pad_id|>", reserved(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                  "<|python_tag|>"]
        first = 3
    return names + [reserved(first + i) for i in range(N_LLAMA3_SPECIAL - len(names))]


def convert_llama3(path: str, version: str, n_ranks: int = LLAMA3_RANKS) -> tuple:
    """tokenizer.json and tokenizer_config.json as structures; n_ranks is for tests."""
    ranks = read_ranks(path)
    if len(ranks) != n_ranks:
        raise BadInput(f"{path}: expected LLaMA-3's {n_ranks} ranks, found {len(ranks)}")
    names = llama3_special(version)
    tokens = [added(n_ranks + i, name, True) for i, name in enumerate(names)]
    post = {"type": "Sequence", "processors": [byte_level(True, False, True), bos_template(names[0], n_ranks)]}
    model = byte_level_bpe(ranks, ignore_merges=True)
    config = {"bos_token": names[0], "eos_token": names[1], "clean_up_tokenization_spaces": False,
              "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 8192 if version == "3" else 131072,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    return structure(tokens, None, isolated_split(LLAMA3_CUT, True), post, byte_level(True, True, True), model), config


def convert_qwen(path: str, config_path: str) -> tuple:
    ranks = read_ranks(path)
    try:
        config = json.loads(read(config_path).decode("utf-8"))
        tokens = [added(int(token_id), token["content"], bool(token["special"]),
                        {flag: bool(token[flag]) for flag in ("single_word", "lstrip", "rstrip", "normalized")})
                  for token_id, token in config["added_tokens_decoder"].items()]
        contents = {token["content"] for token in tokens if token["content"] + ""}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadInput(f"{config_path}: expected JSON with \"added_tokens_decoder\": {{id: {{\"content\", \"special\", ...}}}}, "
                       "found something else") from None
    tokens.sort(key=lambda token: token["id"])
    ids = [token["id"] for token in tokens]
    if ids != list(range(len(ranks), len(ranks) + len(ids))) or len(contents) != len(ids):
        raise BadInput(f"{config_path}: expected different tokens with the ids after the {len(ranks)} ranks of {path}, "
                       f"found ids {min(ids, default=None)} to {max(ids, default=None)}")
    model = byte_level_bpe(ranks, continuing_subword_prefix="", end_of_word_suffix="")
    plain = byte_level(False, False, False)
    return structure(tokens, {"type": "NFC"}, isolated_split(QWEN_CUT, False), plain, plain, model), config


# ---- SentencePiece ----------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def protobuf_fields(data: bytes, what: str):
    """Yields (field number, value) of one message: int for varints and fixed numbers, bytes for the rest."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise BadInput(f"{what}: expected a SentencePiece model, found a damaged number at byte {at}")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire, -1)
        if number == 0 or size < 0 or size > len(data) - at:
            raise BadInput(f"{what}: expected a SentencePiece model, found a damaged field at byte {at}")
        value = data[at:at + size]
        at += size
        yield number, value if wire == 2 else int.from_bytes(value, "little")


def read_fields(data: bytes, what: str, wanted: dict) -> dict:
    """wanted: number -> (name, type, default); a field that occurs twice keeps its last value."""
    values = {name: default for name, _, default in wanted.values()}
    for number, value in protobuf_fields(data, what):
        if number not in wanted:
            continue
        name, kind, _ = wanted[number]
        if (kind in (str, bytes)) != isinstance(value, bytes):
            raise BadInput(f"{what}: field {name}: expected a {kind.__name__}, found another type")
        if kind is str:
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError:
                raise BadInput(f"{what}: field {name}: expected UTF-8, found {value[:20]!r}") from None
        elif kind is float:
            value = struct.unpack("<f", (value & 0xFFFFFFFF).to_bytes(4, "little"))[0]
        elif kind is bool:
            value = value != 0
        values[name] = value
    return values


PIECE_FIELDS = {1: ("piece", str, ""), 2: ("score", float, 0.0), 3: ("type", int, NORMAL)}
TRAINER_FIELDS = {3: ("model_type", int, 1), 24: ("treat_whitespace_as_suffix", bool, False), 35: ("byte_fallback", bool, False),
                  41: ("bos_id", int, 1), 42: ("eos_id", int, 2)}
NORMALIZER_FIELDS = {1: ("name", str, ""), 2: ("precompiled_charsmap", bytes, b""), 3: ("add_dummy_prefix", bool, True),
                     4: ("remove_extra_whitespaces", bool, True), 5: ("escape_whitespaces", bool, True)}


def read_sentencepiece(path: str) -> tuple:
    """(pieces, trainer, normalizer), refused where tokenizer.json could not say the same."""
    pieces, trainer, normalizer = [], b"", b""
    for number, value in protobuf_fields(read(path), path):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise BadInput(f"{path}: field {number}: expected a message, found a number")
        if number == 1:
            pieces.append(read_fields(value, f"{path}: piece {len(pieces)}", PIECE_FIELDS))
        elif number == 2:
            trainer += value
        elif number == 3:
            normalizer += value
    if not pieces:
        raise BadInput(f"{path}: expected a SentencePiece model, found no pieces")
    trainer = read_fields(trainer, f"{path}: trainer_spec", TRAINER_FIELDS)
    normalizer = read_fields(normalizer, f"{path}: normalizer_spec", NORMALIZER_FIELDS)
    if trainer["model_type"] != 2:
        kind = trainer["model_type"]
        raise BadInput(f"{path}: model_type: expected bpe, found {MODEL_TYPES.get(kind, kind)}")
    if normalizer["precompiled_charsmap"]:
        raise BadInput(f"{path}: normalizer: expected identity, found {normalizer['name'] or 'a character map'}")
    for spec, key, expected in ((trainer, "treat_whitespace_as_suffix", False), (normalizer, "remove_extra_whitespaces", False),
                                (normalizer, "escape_whitespaces", True)):
        if spec[key] != expected:
            raise BadInput(f"{path}: {key}: expected {str(expected).lower()}, found {str(spec[key]).lower()}")
    return pieces, trainer, normalizer


def sentencepiece_ranks(path: str, pieces: list) -> dict:
    """piece -> rank among those that text is merged to: by score, the highest first.

    Of pairs with one score SentencePiece joins the leftmost, which an order of pairs can only say for runs of one character
    in all lengths up to some longest (LLaMA-2's spaces): there, longest first makes one run grow from the left.
    """
    normal = [piece for piece in pieces if piece["type"] == NORMAL]
    characters = {piece["piece"] for piece in normal if len(piece["piece"]) == 1}
    by_score = {}
    for piece in normal:
        name = piece["piece"]
        missing = set(name) - characters
        if missing:
            raise BadInput(f"{path}: piece {name!r}: expected each of its characters to be a piece, found none for {min(missing)!r}")
        if not -float("inf") < piece["score"] < float("inf"):
            raise BadInput(f"{path}: piece {name!r}: expected a finite score, found {piece['score']}")
        if len(name) > 1:
            by_score.setdefault(piece["score"], []).append(name)
    ranks = {}
    for score in sorted(by_score, reverse=True):
        names = sorted(by_score[score], key=len, reverse=True)
        if len(names) > 1 and (len(set("".join(names))) > 1 or len(names) != len(names[0]) - 1):
            raise BadInput(f"{path}: expected a score of its own for each piece, found {score:g} for {names[0]!r} and {names[1]!r}")
        for name in names:
            ranks[name] = len(ranks)
    return ranks


def convert_sentencepiece(path: str, style: str) -> tuple:
    """style "prepend": spaces are rewritten by a normalizer, as in LLaMA-2's first tokenizer.json; "metaspace": by the
    pre-tokenizer, as transformers 5 and Mistral do. They differ after an added token only: a new leading space or none."""
    pieces, trainer, normalizer = read_sentencepiece(path)
    vocab = {}
    for index, piece in enumerate(pieces):
        name, kind = piece["piece"], piece["type"]
        if not name or name in vocab:
            raise BadInput(f"{path}: piece {index}: expected a piece of its own, found {name!r}")
        if kind == UNUSED or not NORMAL <= kind <= BYTE:
            raise BadInput(f"{path}: piece {index} {name!r}: expected a used piece, found " +
                           ("an unused one" if kind == UNUSED else f"type {kind}"))
        vocab[name] = index
    unknown = [index for index, piece in enumerate(pieces) if piece["type"] == UNKNOWN]
    if len(unknown) != 1:
        raise BadInput(f"{path}: expected one unknown piece, found {len(unknown)}")
    if trainer["byte_fallback"]:
        for byte in range(256):
            index = vocab.get(f"<0x{byte:02X}>")
            if index is None or pieces[index]["type"] != BYTE:
                raise BadInput(f"{path}: byte_fallback: expected the byte piece <0x{byte:02X}>, found none")
    tokens = [added(index, piece["piece"], piece["type"] != USER_DEFINED) for index, piece in enumerate(pieces)
              if piece["type"] in (UNKNOWN, CONTROL, USER_DEFINED)]
    model = bpe(vocab, recover_merges(sentencepiece_ranks(path, pieces)), unk_token=pieces[unknown[0]]["piece"], fuse_unk=True,
                byte_fallback=trainer["byte_fallback"])

    prefix = normalizer["add_dummy_prefix"]
    if style == "metaspace":
        rewriting = None
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first" if prefix else "never", "split": False}
    else:
        steps = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        rewriting, pre_tokenizer = {"type": "Sequence", "normalizers": steps}, None
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    def control(key):
        index = trainer[key]
        return pieces[index]["piece"] if index < len(pieces) and pieces[index]["type"] == CONTROL else None
    bos, eos = control("bos_id"), control("eos_id")
    post = bos_template(bos, vocab[bos]) if bos is not None else None
    config = {"add_bos_token": bos is not None, "add_eos_token": False, "bos_token": bos, "eos_token": eos,
              "unk_token": model["unk_token"], "clean_up_tokenization_spaces": False, "legacy": style != "metaspace",
              "tokenizer_class": "LlamaTokenizer"}
    return structure(tokens, rewriting, pre_tokenizer, post, {"type": "Sequence", "decoders": decoders}, model), config


# ---- the command line -----------------------------------------------------------------------------------------------------

def save(folder: str, converted: tuple) -> None:
    tokenizer, config = converted
    write(os.path.join(folder, "tokenizer_config.json"), json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    write(os.path.join(folder, "tokenizer.json"), json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n")
    model = tokenizer["model"]
    print(f"{folder}: {len(model['vocab'])} pieces, {len(model['merges'])} merges, {len(tokenizer['added_tokens'])} added tokens")


def copy(source: str, target: str) -> None:
    write(target, read(source).decode("utf-8"))
    print(f"{os.path.dirname(target)}: a copy of {os.path.basename(source)}")


def convert_all(data: str, out: str) -> None:
    """Every family that the folder holds, each in its own directory."""
    def source(*names):
        return os.path.join(data, *names)

    def target(*names):
        return os.path.join(out, *names)
    llama2, qwen = source("llama2", "tokenizer.model"), source("qwen", "qwen.tiktoken")
    jobs = [(source("llama3", "tokenizer.model"), lambda path: save(target("llama3"), convert_llama3(path, "3.1"))),
            (qwen, lambda path: save(target("qwen2.5"), convert_qwen(path, source("qwen", "qwen2.5_tokenizer_config.json")))),
            (qwen, lambda path: save(target("qwen3"), convert_qwen(path, source("qwen", "qwen3_tokenizer_config.json")))),
            (llama2, lambda path: save(target("llama2"), convert_sentencepiece(path, "prepend"))),
            (llama2, lambda path: save(target("llama2-metaspace"), convert_sentencepiece(path, "metaspace")))]
    for name, parts in (("llama2-published", ("llama2", "tokenizer.json")), ("olmo2", ("olmo2", "allenai_dolma2.json")),
                        ("roberta-base", ("roberta-base", "tokenizer.json"))):
        jobs.append((source(*parts), lambda path, name=name: copy(path, target(name, "tokenizer.json"))))
    made = 0
    for path, job in jobs:
        if os.path.exists(path):
            job(path)
            made += 1
        else:
            print(f"{path}: not there, left out", file=sys.stderr)
    if made == 0:
        raise BadInput(f"{data}: expected llama3/tokenizer.model and others like it, found none")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise WrongUsage(message)


def run(arguments: list) -> None:
    parser = OneLineParser(prog="convert_tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", help="what SOURCE is: " + ", ".join(FAMILIES))
    parser.add_argument("source", nargs="?", help="tiktoken ranks (llama3, qwen2, qwen3) or a SentencePiece .model")
    parser.add_argument("--all", metavar="DIR", help="convert or copy every family below DIR, each to a directory of its own in --out")
    parser.add_argument("--out", required=True, metavar="DIR", help="where tokenizer.json and tokenizer_config.json go")
    parser.add_argument("--config", metavar="FILE", help="qwen2, qwen3: the tokenizer_config.json that lists the added tokens")
    parser.add_argument("--version", choices=("3", "3.1"), help="llama3: names of the special tokens; 3.1 (the default) is right for 3.2 and 3.3")
    parser.add_argument("--style", choices=("prepend", "metaspace"),
                        help="sentencepiece: who rewrites spaces, a normalizer (LLaMA-2, the default) or the pre-tokenizer (Mistral)")
    options = parser.parse_args(arguments)
    if (options.all is None) == (options.family is None):
        raise WrongUsage("expected either a family with its source or --all, found " + ("neither" if options.all is None else "both"))
    for name, families in (("config", ("qwen2", "qwen3")), ("version", ("llama3",)), ("style", ("sentencepiece",))):
        if getattr(options, name) is not None and options.family not in families:
            raise WrongUsage(f"--{name} goes with {' or '.join(families)}, found {options.family or '--all'}")
    if options.all is not None:
        return convert_all(options.all, options.out)
    if options.family not in FAMILIES:
        raise WrongUsage(f"family: expected one of {', '.join(FAMILIES)}, found {options.family!r}")
    if options.source is None:
        raise WrongUsage(f"{options.family}: expected a source file, found none")
    if options.family == "llama3":
        converted = convert_llama3(options.source, options.version or "3.1")
    elif options.family == "sentencepiece":
        converted = convert_sentencepiece(options.source, options.style or "prepend")
    elif options.config is None:
        raise WrongUsage(f"{options.family}: expected --config tokenizer_config.json, found none")
    else:
        converted = convert_qwen(options.source, options.config)
    save(options.out, converted)


def main(arguments: list) -> int:
    try:
        run(arguments)
        return 0
    except WrongUsage as error:
        print(f"convert_tokenizer: {error}", file=sys.stderr)
        return 2
    except BadInput as error:
        print(f"convert_tokenizer: {error}", file=sys.stderr)
        return 3
    except (OSError, MemoryError) as error:
        print(f"convert_tokenizer: {error or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
