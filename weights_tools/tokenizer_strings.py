"""Strings that tokenizers get wrong, for the goldens and for the differential test; the same seed gives the same strings.

`strings(count, seed, ...)` first goes through every code point below 0x30000, alone and between others (about 584,000
strings), then draws from the makers below until `count` is reached. Nothing here knows a tokenizer; spellings of added
tokens and pieces of a vocabulary come from the caller.
"""

import itertools
import json
import lzma
import pathlib
import random
import tarfile
import unicodedata

LAST_LISTED = 0x30000
SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)]
NOT_SPACES = list("\x00\x1b\x1c\x1d\x1e\x1f\x7f\u180e\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u061c\u2581\ufffd")
APOSTROPHES = ["'", "'", "'", "'", "\u2019", "\u2018", "`", "\u00b4", "\u02bc", "\uff07"]
SUFFIXES = ["s", "t", "re", "ve", "m", "ll", "d", "\u017f", "\u017fs", "x", "l", "r", "v", "", "st", "\u212a", "\u0131", "s1", "RE"]
WORDS = """the of and Hello World don can't we're I'll X x1 _name foo_bar CamelCase naïve café Straße ŒUVRE ǅungla http://a.b/c?d=e
for(int i=0;i<n;++i) std::vector<float> == != -> => // /* */ #include "x.h" 3.14 1,000.00 1e-9 0xFF $5.00 50% a@b.c <s> </s> <unk> ... !!! ?! —
中文 日本語 かな カナ 한국어 ไทย हिन्दी தமிழ் العربية עברית ქართული Ελληνικά Русский Հայերեն አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ བོད ខ្មែរ မြန်မာ ລາວ සිංහල 𝒜𝓑 𐍈 🀄""".split()
SCRIPTS = [(0x20, 0x7F), (0xA0, 0x180), (0x180, 0x370), (0x370, 0x530), (0x530, 0x700), (0x900, 0xE00), (0xE00, 0x1100), (0x1100, 0x1200),
           (0x1200, 0x1800), (0x1E00, 0x2000), (0x2000, 0x2E00), (0x3000, 0x3400), (0x4E00, 0x5200), (0xA000, 0xAC00), (0xAC00, 0xB000),
           (0xF900, 0x10000), (0x10000, 0x10800), (0x11000, 0x11800), (0x1D100, 0x1D800), (0x1F000, 0x1FB00), (0x2F800, 0x2FA20)]
EMOJI = [chr(c) for c in itertools.chain(range(0x1F300, 0x1F650), range(0x1F680, 0x1F700), range(0x1F900, 0x1FA00), range(0x2600, 0x2700))]
EMOJI_GLUE = ["\u200d", "\u200d", "\ufe0f", "\ufe0e", "\u20e3", "\U0001f3fb", "\U0001f3ff", "\U0001f1e9\U0001f1ea", "\U000e0067", "\U000e007f", ""]


def is_scalar(code: int) -> bool:
    return not 0xD800 <= code < 0xE000


LISTED = [chr(code) for code in range(LAST_LISTED) if is_scalar(code)]
DIGITS = [c for c in LISTED if unicodedata.category(c) in ("Nd", "Nl", "No")]
MARKS = [c for c in LISTED if unicodedata.category(c) in ("Mn", "Mc", "Me")]
ORDERED_MARKS = [c for c in MARKS if unicodedata.combining(c)]
DECOMPOSED = [c for c in LISTED if unicodedata.decomposition(c) and not 0xAC00 <= ord(c) < 0xD7A4]
JAMO = [chr(c) for c in itertools.chain(range(0x1100, 0x1200), range(0x1161, 0x1176), range(0x11A7, 0x11C3), range(0xA960, 0xA980), range(0xD7B0, 0xD7FC))]
BASES = list("aeiouAEIOUnNcCsSqQzZ1 \u03b1\u03c9\u0391\u0438\u0415\u05d0\u0915\u09c7\u0b47\u0bc6\u0cbf\u0d46\u0dd9\u1025\u304b\u30cf\u6c34\uac00\uac01\u212b\u00e7\u1e63\u01d5")


def each_code_point(char: str) -> tuple:
    """Alone; between letters, digits, spaces and lines, and taken apart; in contractions, and among marks that are put in order."""
    return (char, f"a{char}b 1{char}2 {char} {char}\n{char}\n{unicodedata.normalize('NFD', char)}",
            f"{char}'s '{char} {char}{char}'T{char} 're{char}\t{char}3a\u0345{char}\u0334\u0301{char}\u0323")


class Maker:
    """Draws strings; `spellings` are those of added tokens, `piece(rng)` gives the text of a random token."""

    def __init__(self, seed: int, texts: list, spellings: list, piece=None):
        self.rng = random.Random(seed)
        self.texts = texts
        self.spellings = spellings
        self.piece = piece or (lambda rng: rng.choice(WORDS))
        self.kinds = [self.scripts, self.spaces, self.contractions, self.digits, self.marks, self.normal_forms, self.jamo, self.emoji,
                      self.runs, self.anything, self.words, self.pieces]
        self.kinds += [self.added] * (2 if spellings else 0) + [self.snippet] * (4 if texts else 0)

    def many(self, choices: list, most: int) -> str:
        return "".join(self.rng.choices(choices, k=self.rng.randint(1, most)))

    def scripts(self) -> str:
        out = []
        for _ in range(self.rng.randint(1, 8)):
            low, high = self.rng.choice(SCRIPTS)
            out += [chr(self.rng.randrange(low, high)) for _ in range(self.rng.randint(1, 6))]
            out.append(self.rng.choice(["", "", " ", "  ", "\n", "'", "1", "."]))
        return "".join(out)

    def spaces(self) -> str:
        return self.many(SPACES + [" "] * 20 + ["\n", "\r\n", "\r", "\t"] * 4 + NOT_SPACES[:4] + ["a", "B", "1", ".", "'s", "\u00e9"] * 3, 16)

    def contractions(self) -> str:
        out = []
        for _ in range(self.rng.randint(1, 4)):
            suffix = "".join(self.rng.choice([c, c.upper()]) for c in self.rng.choice(SUFFIXES))
            out.append(self.rng.choice(["", " ", "a", "It", "1", "!", "\u00e9", "''", "\n"]) + self.rng.choice(APOSTROPHES) + suffix)
            out.append(self.rng.choice(["", "", " ", "x", "\u017f", "'", "9", "\u0301"]))
        return "".join(out)

    def digits(self) -> str:
        zero = self.rng.choice(DIGITS)
        own = [c for c in (chr(ord(zero) + i) for i in range(10)) if unicodedata.category(c).startswith("N")] or [zero]
        kind = self.rng.randrange(3)
        digits = DIGITS if kind == 0 else own if kind == 1 else list("0123456789")
        glue = ["", "", "", "", ",", ".", " ", "a", "-", "\n", "\u0301"]
        return "".join(self.many(digits, 10) + self.rng.choice(glue) for _ in range(self.rng.randint(1, 4)))

    def marks(self) -> str:
        marks = self.rng.choice([MARKS, ORDERED_MARKS, [chr(c) for c in range(0x300, 0x370)]])
        return "".join(self.rng.choice(BASES + [""]) + "".join(self.rng.choices(marks, k=self.rng.randint(0, 5))) for _ in range(self.rng.randint(1, 6)))

    def normal_forms(self) -> str:
        out = []
        for _ in range(self.rng.randint(1, 6)):
            char = self.rng.choice(DECOMPOSED) if self.rng.random() < 0.8 else chr(self.rng.randrange(0xAC00, 0xD7A4))
            out.append(unicodedata.normalize(self.rng.choice(["NFC", "NFD", "NFKD", "NFKC"]), char) if self.rng.random() < 0.7 else char)
            out.append(self.rng.choice(["", "", "", " ", "\u0301", "\u0327", "a"]))
        return "".join(out)

    def jamo(self) -> str:
        return self.many(JAMO + ["\uac00", "\uac01", "\ud7a3", " ", "\u0300"] * 10, 12)

    def emoji(self) -> str:
        return "".join(self.rng.choice(EMOJI) + self.rng.choice(EMOJI_GLUE) + self.rng.choice(["", "", "", " ", "a"]) for _ in range(self.rng.randint(1, 7)))

    def runs(self) -> str:
        unit = self.rng.choice(["a", " ", "\n", "\t", "!", "=", "-", "\u4e2d", "'", "\u00a0", "ab", "1", "\u0301", "\u1100", " a", "\r\n", "\u2581", "Ab", "\U0001f600", ". "])
        return self.rng.choice(["", "x", " "]) + unit * min(int(self.rng.expovariate(0.04)) + 1, 400) + self.rng.choice(["", "x", "1", "\n"])

    def anything(self) -> str:
        out = []
        for _ in range(self.rng.randint(1, 12)):
            code = self.rng.randrange(self.rng.choice([0x80, 0x800, 0x10000, 0x30000, 0x110000]))
            out.append(chr(code) if is_scalar(code) else "\ufffd")
        return "".join(out)

    def words(self) -> str:
        return "".join(self.rng.choice(WORDS) + self.rng.choice([" ", " ", "", "  ", "\n", "\n\n", "\t", ", "]) for _ in range(self.rng.randint(1, 8)))

    def pieces(self) -> str:
        return "".join(self.piece(self.rng) for _ in range(self.rng.randint(1, 5)))

    def added(self) -> str:
        """Spellings of added tokens, also damaged, with what may touch them."""
        out = []
        for _ in range(self.rng.randint(1, 4)):
            spelling = self.rng.choice(self.spellings)
            how = self.rng.random()
            if how < 0.1:
                spelling = spelling[: self.rng.randrange(len(spelling))]
            elif how < 0.2:
                spelling = spelling[self.rng.randrange(len(spelling)):]
            elif how < 0.25:
                spelling = spelling.upper()
            out += [self.rng.choice(["", "", " ", "  ", "\n", "a", "\u0301", "<", "|", "\u2581", " the", "1", "e"]), spelling]
        return "".join(out) + self.rng.choice(["", "", " ", "\n\n", "z", "\u0301", ">", " end"])

    def snippet(self) -> str:
        text = self.rng.choice(self.texts)
        begin = self.rng.randrange(len(text))
        return text[begin:begin + self.rng.randint(1, 90)]

    def long_word(self) -> str:
        """Ten to seventy thousand characters that most pre-tokenizers leave in one word: by chance, or a few over and over, with slips."""
        length = self.rng.choice([self.rng.randint(10_000, 70_000), self.rng.randint(1, 4) * 16384 + self.rng.randint(-2, 600)])
        letters = "abcdefghijklmnopqrstuvwxyz"
        kind = self.rng.randrange(8)
        if kind == 0:  # tokens of the vocabulary, without what would end a word
            choices = [c for c in ("".join(filter(str.isalpha, self.piece(self.rng))) for _ in range(200)) if c] or ["a"]
        elif kind == 1:
            choices = list(self.rng.choice([letters, letters.upper(), "ACGT", "=-", "!?.,;:/\\|#*_~^", " ", " \n", "\n", "\t ", "0123456789"]))
        elif kind == 2:
            choices = self.rng.choices(letters, k=self.rng.randint(1, 4))
        elif kind == 3:
            low, high = self.rng.choice(SCRIPTS)
            choices = [chr(self.rng.randrange(low, high)) for _ in range(self.rng.choice([1, 2, 5, 200]))]
        elif kind == 4:
            choices = self.rng.choices(EMOJI, k=self.rng.choice([1, 3, 100]))
        elif kind == 5:
            choices = self.rng.choices(MARKS, k=self.rng.choice([1, 2, 30]))
        elif kind == 6:
            choices = self.rng.choices(letters + letters.upper(), k=self.rng.randint(2, 12))
        else:
            choices = ["the", "ing", "tion", "er", "an", "un", "qu", "ed", "st", self.rng.choice(letters)]
        if self.rng.random() < 0.4:
            word = "".join(self.rng.choices(choices, k=length))[:length]
        else:
            unit = "".join(self.rng.choices(choices, k=self.rng.choice([1, 1, 2, 3, 5, 17, 300])))
            word = (unit * (length // len(unit) + 1))[:length]
        for _ in range(self.rng.choice([0, 0, 1, 5, 100])):
            at = self.rng.randrange(len(word))
            word = word[:at] + self.rng.choice(choices) + word[at + 1:]
        return word

    def next(self) -> str:
        made = self.rng.choice(self.kinds)()
        if self.rng.random() < 0.15:
            made += self.rng.choice(self.kinds)()
        return made


def strings(count: int, seed: int, texts: list, spellings: list, piece=None):
    """Yields `count` strings; fewer than the listed code points need leaves some of those out (never the others)."""
    listed = itertools.chain.from_iterable(each_code_point(char) for char in LISTED)
    n_listed = min(3 * len(LISTED), count * 3 // 5)
    step = 3 * len(LISTED) / n_listed if n_listed else 1
    if step == 1:
        yield from listed
    else:
        whole = list(listed)
        yield from (whole[int(i * step)] for i in range(n_listed))
    maker = Maker(seed, texts, spellings, piece)
    for _ in range(count - n_listed):
        yield maker.next()


def long_words(count: int, seed: int, piece=None):
    maker = Maker(seed, [], [], piece)
    for _ in range(count):
        yield maker.long_word()


def load_texts(data: pathlib.Path, limit: int = 1 << 20) -> list:
    """The texts of the data folder: every language, and at most `limit` characters of each larger collection."""
    texts = [path.read_bytes().decode("utf-8", "replace") for path in sorted((data / "unicode" / "udhr").glob("*.txt"))]
    texts += [path.read_bytes().decode("utf-8", "replace") for path in [data / "unicode" / "UTF-8-demo.txt"] if path.exists()]
    for name in ("novels", "textbooks"):
        path = data / "text" / f"{name}.tar.xz"
        if not path.exists():
            continue
        with tarfile.open(path, "r|xz") as archive:
            taken = 0
            for member in archive:
                if member.isfile() and taken < limit:
                    text = archive.extractfile(member).read(limit // 4).decode("utf-8", "replace")
                    if text:
                        texts.append(text)
                    taken += len(text)
                if taken >= limit:
                    break
    path = data / "qa" / "qmsum-val.jsonl.xz"
    if path.exists():
        texts.append(json.dumps(lzma.open(path).read(limit // 4).decode("utf-8", "replace")))  # JSON within JSON: code-like
    return [text for text in texts if text]
