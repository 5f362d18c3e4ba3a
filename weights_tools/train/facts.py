"""Endless passages of facts about invented entities, with questions whose answers are exactly known.

An entity's name is made of syllables. Its hash decides the split: names of the split "train" never occur in "test", so a
held-out fact cannot have been learnt by heart. A passage states some attributes of one entity in varied sentences; a
question asks for one of them; the answer is a literal substring of the passage, which names it once.

As a program it writes a file for `refrag eval qa --data`, one question a line with its passage:
    python -m weights_tools.train.facts --split test --passages 400 --out build/facts.jsonl
"""
import argparse
import json
import zlib

import numpy as np

ONSETS = "b br c cr d dr f g gr h j k l m n p pr qu r s st t tr v w z th sh ch kl".split()
VOWELS = "a e i o u a e i o ai ea ou".split()
CODAS = "l n r s t m nd rk x th ld v sk p g".split() + [""] * 12

COLOURS = "red blue green yellow white black purple orange silver golden brown grey pink crimson turquoise".split()
MATERIALS = "copper iron granite marble oak glass bronze clay limestone steel brick slate cedar sandstone tin".split()
ANIMALS = "wolf heron otter lynx falcon bear fox stag owl badger crane tortoise salmon raven hare horse lion eagle bee goat".split()
CROPS = "barley olives rice apples tea cotton grapes potatoes wheat pepper tobacco hops cherries lentils flax".split()
GOODS = "lanterns clocks violins carpets ships paper soap pottery bicycles telescopes boots cheese glass rope pianos bells".split()
JOBS = "botanist painter surgeon sailor architect poet chemist lawyer composer farmer astronomer baker historian teacher engineer".split()
SUBJECTS = "glaciers bees volcanoes fossils tides magnetism orchids earthquakes comets ferns bridges fevers dialects insects caves".split()
MONTHS = "January February March April May June July August September October November December".split()
CUISINES = "soup bread cheese dumplings honey pies fish stew sausages cider plums pancakes mustard".split()
FESTIVALS = "music lanterns kites boats masks drums flowers horses poetry fire dance bread".split()
PLACES_ON = "a hill|an island|a lake|a river|a plateau|the coast|a marsh|a cliff|a desert|a canal|a bay|a ridge".split("|")


def pick(values):
    def value(maker, rng):
        some = maker.its_part(values)
        return some[rng.integers(len(some))]

    return value


def year(maker, rng):
    return str(rng.integers(1100, 2020))


def count(low, high, unit=""):
    def value(maker, rng):
        n = int(np.exp(rng.uniform(np.log(low), np.log(high))))
        return f"{n:,}" + (f" {unit}" if unit else "")

    return value


def place(maker, rng):
    return maker.name(rng)


def person(maker, rng):
    return maker.name(rng) + " " + maker.name(rng)


# kind: (how passages introduce it, name parts, attributes); an attribute: (sentences, questions, value). {n}: name, {v}: value,
# {s}: the subject, either the name again or "The city" and the like.
KINDS = {
    "city": ("{n} is a city in {v}.", 1, {
        "founded": (["{s} was founded in {v}.", "Settlers founded {n} in {v}.", "The founding of {n} dates to {v}."],
                    ["When was {n} founded?", "In what year was {n} founded?"], year),
        "people": (["{s} has {v} inhabitants.", "About {v} people live in {n}.", "The population of {n} is {v}."],
                   ["How many people live in {n}?", "What is the population of {n}?"], count(900, 900000)),
        "goods": (["{s} is known for making {v}.", "The workshops of {n} produce {v}."],
                  ["What is {n} known for making?", "What do the workshops of {n} produce?"], pick(GOODS)),
        "mayor": (["The mayor of {n} is {v}.", "{s} is governed by its mayor, {v}."],
                  ["Who is the mayor of {n}?", "What is the name of the mayor of {n}?"], person),
        "site": (["{s} lies on {v}.", "{n} was built on {v}."], ["Where was {n} built?", "What does {n} lie on?"], pick(PLACES_ON)),
        "animal": (["The flag of {n} shows a {v}.", "A {v} appears on the flag of {n}."],
                   ["What animal is on the flag of {n}?", "What does the flag of {n} show?"], pick(ANIMALS)),
        "festival": (["Every {v}, {n} holds its great fair.", "The great fair of {n} takes place in {v}."],
                     ["In what month is the fair of {n} held?", "When is the great fair of {n}?"], pick(MONTHS)),
    }),
    "person": ("{n} was born in {v}.", 2, {
        "job": (["{s} worked as a {v}.", "By profession {n} was a {v}."],
                ["What was the profession of {n}?", "What did {n} work as?"], pick(JOBS)),
        "born": (["The year of birth of {n} was {v}.", "{s} came into the world in the year {v}."],
                 ["What was the year of birth of {n}?", "In what year was {n} born?"], year),
        "study": (["{s} studied {v} for many years.", "{n} wrote a famous book about {v}."],
                  ["What did {n} study?", "What did {n} write about?"], pick(SUBJECTS)),
        "pet": (["{s} kept a tame {v}.", "A {v} was the companion of {n}."],
                ["What animal did {n} keep?", "Which animal was the companion of {n}?"], pick(ANIMALS)),
        "friend": (["{s} was married to {v}.", "{n} married {v}."], ["Who was married to {n}?", "Whom did {n} marry?"], person),
        "colour": (["{s} always wore a {v} coat.", "The coat of {n} was {v}."],
                   ["What colour was the coat of {n}?", "Which colour did {n} wear?"], pick(COLOURS)),
        "food": (["{s} was very fond of {v}.", "The favourite food of {n} was {v}."],
                 ["What was the favourite food of {n}?", "What was {n} very fond of?"], pick(CUISINES)),
    }),
    "river": ("The {n} is a river in {v}.", 1, {
        "length": (["{s} is {v} long.", "The length of the {n} is {v}."],
                   ["How long is the {n}?", "What is the length of the {n}?"], count(20, 4000, "km")),
        "sea": (["{s} flows into the {v} Sea.", "The {n} ends in the {v} Sea."],
                ["Which sea does the {n} flow into?", "Into what sea does the {n} flow?"], place),
        "fish": (["Along its banks lives the rare {v} of the {n}.", "The {n} is home to a rare {v}."],
                 ["What rare animal lives on the {n}?", "What animal is the {n} home to?"], pick(ANIMALS)),
        "crop": (["Farmers along the {n} grow {v}.", "The valley of the {n} is famous for its {v}."],
                 ["What do farmers along the {n} grow?", "What is the valley of the {n} famous for?"], pick(CROPS)),
        "bridge": (["The first bridge over the {n} was made of {v}.", "A bridge of {v} crosses the {n}."],
                   ["What is the bridge over the {n} made of?", "What was the first bridge over the {n} made of?"], pick(MATERIALS)),
        "flood": (["A great flood of the {n} happened in {v}.", "In {v} the {n} flooded its valley."],
                  ["When was the great flood of the {n}?", "In what year did the {n} flood its valley?"], year),
    }),
    "company": ("{n} is a company based in {v}.", 1, {
        "started": (["{s} was started in {v}.", "The history of {n} began in {v}."],
                    ["When was {n} started?", "In what year did the history of {n} begin?"], year),
        "product": (["{s} makes {v}.", "The main product of {n} is {v}."],
                    ["What does {n} make?", "What is the main product of {n}?"], pick(GOODS)),
        "head": (["{s} is led by {v}.", "The head of {n} is {v}."], ["Who leads {n}?", "Who is the head of {n}?"], person),
        "staff": (["{s} employs {v} people.", "There are {v} workers at {n}."],
                  ["How many people does {n} employ?", "How many workers are there at {n}?"], count(20, 50000)),
        "logo": (["The sign of {n} is a {v}.", "{s} uses a {v} as its sign."],
                 ["What is the sign of {n}?", "Which animal does {n} use as its sign?"], pick(ANIMALS)),
        "colour": (["The vans of {n} are painted {v}.", "{s} paints all its vans {v}."],
                   ["What colour are the vans of {n}?", "What colour does {n} paint its vans?"], pick(COLOURS)),
    }),
    "tower": ("The {n} Tower is a building in {v}.", 1, {
        "height": (["{s} is {v} high.", "The height of the {n} Tower is {v}."],
                   ["How high is the {n} Tower?", "What is the height of the {n} Tower?"], count(15, 600, "metres")),
        "made": (["{s} was built of {v}.", "The walls of the {n} Tower are of {v}."],
                 ["What was the {n} Tower built of?", "What are the walls of the {n} Tower made of?"], pick(MATERIALS)),
        "architect": (["{s} was designed by {v}.", "The architect of the {n} Tower was {v}."],
                      ["Who designed the {n} Tower?", "Who was the architect of the {n} Tower?"], person),
        "done": (["{s} was finished in {v}.", "Work on the {n} Tower ended in {v}."],
                 ["When was the {n} Tower finished?", "In what year did work on the {n} Tower end?"], year),
        "roof": (["The roof of the {n} Tower is {v}.", "{s} has a {v} roof."],
                 ["What colour is the roof of the {n} Tower?", "What is the colour of the {n} Tower's roof?"], pick(COLOURS)),
        "inside": (["Inside the {n} Tower there is a museum of {v}.", "{s} houses a collection of {v}."],
                   ["What is the museum in the {n} Tower about?", "What collection does the {n} Tower house?"], pick(SUBJECTS + GOODS)),
    }),
}
SUBJECT = {"city": "The city", "person": "This person", "river": "The river", "company": "The company", "tower": "The tower"}
INTRO_QUESTION = {
    "city": "In which country is {n}?", "person": "Where was {n} born?", "river": "In which country is the {n}?",
    "company": "Where is {n} based?", "tower": "Where is the {n} Tower?",
}


class FactMaker:
    """Makes passages of one split, "train" or "test"; all randomness comes from the generator given to each call. With `strict` the splits
    share no value of a list, no sentence and no wording of a question either (but the introduction)."""

    def __init__(self, split, test_percent=10, strict=False):
        assert split in ("train", "test")
        self.split, self.test_percent, self.strict = split, test_percent, strict

    def its_part(self, values):
        """What of a list of values belongs to this split."""
        if not self.strict:
            return values
        return [v for v in values if (zlib.crc32(v.encode()) % 4 == 3) == (self.split == "test")]

    def its_forms(self, forms):
        """What of a list of wordings does: the last one is the test's."""
        if not self.strict:
            return forms
        return forms[-1:] if self.split == "test" else forms[:-1]

    def name(self, rng):
        """An invented name of this split."""
        while True:
            n_syllables = 2 if rng.random() < 0.75 else 3
            syllables = [ONSETS[rng.integers(len(ONSETS))] + VOWELS[rng.integers(len(VOWELS))] for _ in range(n_syllables)]
            name = ("".join(syllables) + CODAS[rng.integers(len(CODAS))]).capitalize()
            in_test = zlib.crc32(name.encode()) % 100 < self.test_percent
            if in_test == (self.split == "test"):
                return name

    def passage(self, rng, kind=None, n_facts=None):
        """{"kind", "name", "title", "text", "qas": [(question, answer)]}: one entity and its facts."""
        kind = kind or list(KINDS)[rng.integers(len(KINDS))]
        intro, name_parts, attributes = KINDS[kind]
        name = " ".join(self.name(rng) for _ in range(name_parts))
        n_facts = n_facts or int(rng.integers(2, 6))
        chosen = rng.permutation(list(attributes))[:n_facts]
        origin = self.name(rng)
        sentences, qas, used = [intro.format(n=name, v=origin)], [(INTRO_QUESTION[kind].format(n=name), origin)], {origin}
        for key in chosen:
            forms, questions, value_of = attributes[key]
            forms, questions = self.its_forms(forms), self.its_forms(questions)
            value = value_of(self, rng)
            while value in used:
                value = value_of(self, rng)
            used.add(value)
            the_name = {"river": f"The {name}", "tower": f"The {name} Tower"}.get(kind, name)
            subject = the_name if rng.random() < 0.7 else SUBJECT[kind]
            sentences.append(forms[rng.integers(len(forms))].format(n=name, v=value, s=subject))
            qas.append((questions[rng.integers(len(questions))].format(n=name), value))
        title = {"river": f"{name} (river)", "tower": f"{name} Tower"}.get(kind, name)
        return {"kind": kind, "name": name, "title": title, "text": " ".join(sentences), "qas": qas}

    @staticmethod
    def pronoun(question, name, kind):
        """The question as one asks it after another about the same entity: "it", or "this person", for the name."""
        said = "this person" if kind == "person" else "it"
        for form in (f"the {name} Tower", f"the {name}", name):
            question = question.replace(form, said)
        return question

    def task(self, rng, n_passages, same_kind=0.5):
        """(passages, index of the one that answers, its [(question, answer)]); names differ between the passages."""
        kind = list(KINDS)[rng.integers(len(KINDS))]
        passages, names = [], set()
        while len(passages) < n_passages:
            p = self.passage(rng, kind if not passages or rng.random() < same_kind else None)
            if p["name"] not in names:
                names.add(p["name"])
                passages.append(p)
        gold = passages[0]
        order = rng.permutation(n_passages)
        return [passages[i] for i in order], int(np.flatnonzero(order == 0)[0]), gold["qas"]


def lines(split, n_passages, seed, kinds=None, turns=False, strict=False):
    """Lines of {"id", "title", "text", "question", "answers"}: every question of n_passages passages whose names differ. With `turns`
    a passage is one line {"id", "title", "text", "turns"}, and all questions but the first say "it" or "this person"."""
    rng, maker, names = np.random.default_rng(seed), FactMaker(split, strict=strict), set()
    while len(names) < n_passages:
        p = maker.passage(rng, kinds and kinds[rng.integers(len(kinds))])
        if p["name"] in names:
            continue
        names.add(p["name"])
        if turns:
            said = [(FactMaker.pronoun(q, p["name"], p["kind"]) if i else q, a) for i, (q, a) in enumerate(p["qas"])]
            yield {"id": str(len(names)), "title": p["title"], "text": p["text"], "turns": [{"question": q, "answers": [a]} for q, a in said]}
            continue
        for i, (question, answer) in enumerate(p["qas"]):
            yield {"id": f"{len(names)}-{i + 1}", "title": p["title"], "text": p["text"], "question": question, "answers": [answer]}


def main():
    parser = argparse.ArgumentParser(description="Writes passages of facts and their questions as JSON Lines.")
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help=f"some of {','.join(KINDS)} (default: all)")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--turns", action="store_true", help="a passage's questions as one conversation")
    parser.add_argument("--strict", action="store_true", help="values and wordings that the other split has not")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    for kind in args.kinds or []:
        if kind not in KINDS:
            parser.error(f"--kinds: expected some of {','.join(KINDS)}, found {kind}")
    with open(args.out, "w", encoding="utf-8") as out:
        for line in lines(args.split, args.passages, args.seed, args.kinds, args.turns, args.strict):
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
