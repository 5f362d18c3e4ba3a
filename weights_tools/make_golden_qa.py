"""Makes tests/golden/qa: what SQuAD's evaluation makes of generated answers, in plain Python, for tests/test_qa_metrics.cpp.

    python weights_tools/make_golden_qa.py

metrics.json: predictions, gold answers, the tokens compared, exact match and F1, and by Lin's definition (2004) ROUGE-L with the
tokens that it compares. unicode.json: ranges of code points as
this Python's Unicode version knows them: assigned, letters and numbers (\\w without "_"), white space of str.split(),
characters in whose presence a sigma is final, and the lower case of single characters. Needs the standard library alone.
"""
import argparse
import collections
import json
import pathlib
import random
import re
import string
import unicodedata

SEED = 7
WORDS = """a an the The THE An A a. the, an' 'the' the-the a-b x-a the_end _a_ athe thea Anthem theatre 1970s 3.5 1,000 $5 50% U.S. can't
don’t “the” ‘a’ –a– a–the–b …the ÉCOLE École école É İstanbul ISTANBUL IŞIK ΟΔΟΣ ΟΔΟΣ. ΣΑΣ Σ ΑΣ’ Α.Σ ΑΣ.Α σς ǅ Ǆ Ω K Å ß ẞ ﬀ ﬁ Ⅷ ⅷ Ⓐ ⓐ
中文 日本語 한국어 हिन्दी ไทย العربية עברית ქართული ᲥᲐᲠ Ꭰ ꭰ 𐐀 𐐨 𝐀 ½ ² ٣ १ a² ²the the² á a\u0301 the\u0301 \u0301the a\u200d \u200da ª º ªthe
~ ` ! @ # $ % ^ & * ( ) _ + - = [ ] { } | \\ ; : ' " , . < > / ? ¿ ¡ « » — € £ ☃ 👩‍👧 🇩🇪 \ufffd \ufeffthe""".split()
WORDS += "king river red Norman army water of in and 1066 Saint-Denis O'Neil mill barley".split() * 8
SPACES = [" "] * 20 + ["  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2003",
                      "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", ""]


def normalised(text):
    text = text.lower()
    text = "".join(c for c in text if c not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def exact(prediction, gold):
    return int(normalised(prediction) == normalised(gold))


def f1(prediction, gold):
    said, true = normalised(prediction).split(), normalised(gold).split()
    if not said or not true:
        return float(said == true)
    same = sum((collections.Counter(said) & collections.Counter(true)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(true)
    return 2 * precision * recall / (precision + recall)


def rouge_tokens(text):
    """Lower case, and every run of other characters than a-z and 0-9 separates."""
    return re.findall("[a-z0-9]+", text.lower())


def longest_common(a, b):
    """Length of the longest common subsequence, from the whole table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l(prediction, gold):
    said, true = rouge_tokens(prediction), rouge_tokens(gold)
    same = longest_common(said, true)
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(true)
    return 2 * precision * recall / (precision + recall)


def score(prediction, answers):
    gold = [a for a in answers if normalised(a)]
    if not gold:  # unanswerable: silence is right
        return exact(prediction, ""), f1(prediction, ""), float(exact(prediction, ""))
    return tuple(max(measure(prediction, a) for a in gold) for measure in (exact, f1, rouge_l))


def phrase(rng, n):
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(n))


def variant(rng, text):
    """The text changed a little, so that some predictions match in part or after normalisation."""
    words = text.split(" ")
    change = rng.randrange(5)
    if change == 0 and rng.random() < 0.5:
        return text.upper()
    if change == 1:
        return "The " + text + "."
    if change == 2:
        return " ".join(rng.sample(words, rng.randint(0, len(words))))
    if change == 3:
        return text + " " + rng.choice(words)
    return "".join(c for c in text if rng.random() > 0.05)


def cases(rng, n):
    for _ in range(n):
        answers = [phrase(rng, rng.randint(0, 7)) for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3]))]
        prediction = variant(rng, rng.choice(answers)) if answers and rng.random() < 0.7 else phrase(rng, rng.randint(0, 4))
        yield case(prediction, answers)


def case(prediction, answers):
    em, best, longest = score(prediction, answers)
    return {"prediction": prediction, "answers": answers, "tokens": normalised(prediction).split(), "exact_match": em, "f1": best,
            "rouge_tokens": rouge_tokens(prediction), "rouge_l": longest}


def sentences(rng, n):
    """n of a few words over and over, in sentences."""
    return "".join(rng.choice(WORDS[-13:]) + rng.choice([" ", " ", " ", ", ", ". ", ".\n", "-"]) for _ in range(n))


def summaries(rng, n):
    """Longer texts with many common subsequences, of which the longest has to be found."""
    for _ in range(n):
        answers = [sentences(rng, rng.randint(1, 60)) for _ in range(rng.choice([1, 1, 2]))]
        prediction = sentences(rng, rng.randint(1, 60))
        if rng.random() < 0.5:  # parts of a reference in another order, or in order with others between
            parts = answers[0].split(". ")
            prediction = ". ".join(parts[::-1] if rng.random() < 0.5 else parts[:1] + [sentences(rng, 5)] + parts[1:])
        yield case(prediction, answers)


def ranges(codes):
    """[first, last] of every run of consecutive code points."""
    runs = []
    for c in codes:
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return runs


def unicode_facts():
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
    word = re.compile(r"\w")
    lower = []  # [first, last, step, distance]: runs of characters whose lower case lies at one distance
    for c in codes:
        small = chr(c).lower()
        if small == chr(c) or len(small) != 1:
            continue
        distance = ord(small) - c
        for step in (1, 2):
            if lower and lower[-1][3] == distance and lower[-1][1] == c - step and lower[-1][2] in (0, step):
                lower[-1][1:3] = [c, step]
                break
        else:
            lower.append([c, c, 0, distance])
    return {
        "version": unicodedata.unidata_version,
        "assigned": ranges(codes),
        "word": ranges(c for c in codes if word.match(chr(c)) and c != ord("_")),
        "space": ranges(c for c in codes if chr(c).isspace()),
        "final_sigma_after": ranges(c for c in codes if (chr(c) + "Σ").lower().endswith("ς")),
        "final_sigma_after_a_and": ranges(c for c in codes if ("A" + chr(c) + "Σ").lower().endswith("ς")),
        "final_sigma_before": ranges(c for c in codes if ("AΣ" + chr(c)).lower()[1] == "ς"),
        "lower": lower,
        "lower_long": [[c, chr(c).lower()] for c in codes if len(chr(c).lower()) != 1],
    }


def dump_ranges(facts):
    """One key a line, so that a change can be read."""
    return "{\n" + ",\n".join(f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in facts.items()) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(pathlib.Path(__file__).resolve().parent.parent / "tests/golden/qa"))
    parser.add_argument("--cases", type=int, default=400)
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    lines = [json.dumps(made, ensure_ascii=True) for made in [*cases(rng, args.cases), *summaries(rng, args.cases // 8)]]
    (out / "metrics.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    (out / "unicode.json").write_text(dump_ranges(unicode_facts()))


if __name__ == "__main__":
    main()
