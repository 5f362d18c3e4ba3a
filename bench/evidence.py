#!/usr/bin/env python3
"""Measures the default model by `refrag eval` on text and questions that it has not seen, and draws up the tables of its card.

    python3 bench/evidence.py run       # every table, each as bench/results/nano/NAME.json, then `tables` and the figures
    python3 bench/evidence.py run facts squad
    python3 bench/evidence.py tables    # the tables in weights_tools/refrag-nano/README.md from those files

The held-out texts and questions are made by weights_tools/train/prepare.py (--data, default build/train/data/test). Variants of the
training that are not shipped (--variants, --regularisation, default build/train/...: one model directory each) are measured where
they exist, the latter on validation text.
Needs Python alone; the figures (bench/plot.py) need matplotlib.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_ANSWER = "not in the passages"

PERPLEXITY = ["eval", "perplexity", "--context", "256,512,1024,2048,4096", "--output", "256", "-k", "8,16,32", "--limit", "100"]
SELECTION = ["eval", "perplexity", "--context", "512", "--output", "256", "-k", "16", "-p", "0.1,0.25,0.5", "--limit", "200",
             "--modes", "none,full,last,refrag", "--policy", "model,perplexity-desc,random,perplexity-asc"]
QA = ["eval", "qa", "-k", "16", "-p", "0,0.1,0.25", "--policy", "model,random"]
REGULARISATION = ["eval", "perplexity", "--context", "256", "--output", "256", "--modes", "none,full", "--limit", "200"]


def tables(data, variants, regularisation):
    """{name: (arguments of refrag, model: "" the shipped one, "text" the one with the paper's policy, else a directory)}"""
    out = {}
    for text in ("textbooks", "novels"):
        out[f"perplexity-{text}"] = [*PERPLEXITY, "--text", data / f"{text}.txt"], ""
        out[f"selection-{text}"] = [*SELECTION, "--text", data / f"{text}.txt"], ""
        out[f"selection-text-policy-{text}"] = [*SELECTION, "--text", data / f"{text}.txt"], "text"
    for folder in sorted(variants.glob("*/refrag.json")) if variants.exists() else []:
        for text in ("textbooks", "novels"):
            out[f"variant-{folder.parent.name}-{text}"] = [
                "eval", "perplexity", "--context", "512", "--output", "256", "-k", "8,16", "--limit", "200", "--text", data / f"{text}.txt"], folder.parent
    for folder in sorted(regularisation.glob("*/refrag.json")) if regularisation.exists() else []:
        out[f"regularisation-{folder.parent.name}"] = [*REGULARISATION, "--text", data.parent / "validation/novels.txt"], folder.parent
    facts = ["--distractors", "0,4,9", "--limit", "300", "--data", data / "facts.jsonl"]
    out["facts"] = ["eval", "qa", "-k", "16", "-p", "0,0.1,0.25,0.5", "--policy", "model,random,perplexity-desc", *facts], ""
    out["facts-k8"] = ["eval", "qa", "-k", "8", "-p", "0,0.1,0.25,0.5", "--modes", "refrag", *facts], ""
    out["facts-passages"] = ["eval", "qa", "-k", "16", "-p", "0,0.1,0.25", "--limit", "300", "--distractors", "0,1,3,7,15,31", "--modes", "full,refrag",
                             "--data", data / "facts.jsonl"], ""
    out["squad"] = [*QA, "--limit", "300", "--distractors", "0,4,9", "--data", data / "squad-dev-1.1.jsonl"], ""
    out["squad-2"] = [*QA, "--limit", "300", "--distractors", "0", "--no-answer", NO_ANSWER, "--data", data / "squad-dev-2.0.jsonl"], ""
    for name in ("boolq", "factbook", "cloze"):
        out[name] = [*QA, "--limit", "300", "--distractors", "0,4", "--data", data / f"{name}.jsonl"], ""
    for name in ("fairytaleqa", "medquad"):
        out[name] = [*QA, "--limit", "300", "--distractors", "0", "-n", "64", "--data", data / f"{name}.jsonl"], ""
    for name in ("facts", "squad-dev"):
        out[f"{name}-turns"] = [*QA, "--distractors", "0,4", "--limit", "150", "--max-turns", "4", "--data", data / f"{name}-turns.jsonl"], ""
    for name, length in (("scitldr", "64"), ("qmsum", "128")):
        out[name] = ["eval", "qa", "-k", "8,16", "-p", "0,0.25", "-n", length, "--limit", "300", "--data", data / f"{name}.jsonl"], ""
    return out


def with_text_policy(model, folder):
    """A directory of links to the shipped model whose policy is the paper's, which does not see the question."""
    for entry in model.iterdir():
        if entry.name not in ("refrag.json", "policy.safetensors", "policy-text.safetensors"):
            (folder / entry.name).symlink_to(entry.resolve())
    config = json.loads((model / "refrag.json").read_text())
    config["policy"]["sees_question"] = False
    (folder / "refrag.json").write_text(json.dumps(config))
    (folder / "policy.safetensors").symlink_to((model / "policy-text.safetensors").resolve())
    return folder


def machine():
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} CPUs; {os.uname().sysname} {os.uname().release}"


def commit():
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "src", "cuda", "weights_tools/refrag-nano").returncode != 0
    return git("rev-parse", "--short", "HEAD").stdout.strip() + (" + changes" if changed else "")


def shown(argument):
    """A path as seen from the repository's root."""
    path = Path(str(argument))
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else str(argument)


def measure(name, arguments, which, options):
    with tempfile.TemporaryDirectory() as folder:
        model = {"": options.model, "text": None}.get(str(which), which)
        if model is None:
            model = with_text_policy(options.model, Path(folder))
        command = [options.binary, *map(str, arguments), "-m", str(model), "-o", "json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"evidence.py: {name}: refrag ended with {done.returncode}")
    said = ["refrag", *map(shown, arguments), "-m", shown(options.model if str(which) in ("", "text") else which)]
    result = {"table": name, "model": "with policy-text.safetensors" if str(which) == "text" else shown(which or options.model),
              "command": " ".join(f'"{a}"' if " " in a else a for a in said), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "commit": commit(),
              "machine": machine(), "rows": json.loads(done.stdout)}
    options.results.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)[:-2]
    temporary = options.results / f"{name}.json.tmp"
    temporary.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    temporary.replace(options.results / f"{name}.json")


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def interval(row, what="difference", error="ci95", digits=3):
    return "-" if row.get(what) is None else f"{row[what]:+.{digits}f} ± {number(row[error], digits)}"


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)])


def perplexity_table(rows):
    """None, full, and for every k last and refrag with the share of the gap that they recover."""
    out = []
    for context in sorted({r["context"] for r in rows}):
        at = {(r["mode"], r["k"]): r for r in rows if r["context"] == context}
        none, full = at["none", None], at["full", None]
        for k in sorted({r["k"] for r in rows if r["k"]}):
            last, refrag = at["last", k], at["refrag", k]
            out.append([str(context), str(k), number(none["log_perplexity"], 3),
                        *(f"{number(r['log_perplexity'], 3)} ({number(r['share_recovered'], 2)})" for r in (last, refrag)),
                        number(full["log_perplexity"], 3), number(refrag["standard_error"], 3), str(refrag["n"])])
    return markdown(["context", "k", "none", "last", "refrag", "full", "s.e.", "windows"], out)


def selection_table(rows, policy_name):
    out = []
    for r in rows:
        if r["mode"] == "refrag":
            said = policy_name if r["policy"] == "model" else r["policy"]
            out.append([number(r["p"], 2), said, number(r["log_perplexity"], 3), interval(r)])
        else:
            out.append([number(r["p"], 2), r["mode"], number(r["log_perplexity"], 3), "-"])
    return markdown(["p", "selection", "log-perplexity", "less the policy's"], out)


def qa_table(rows, rouge=False):
    out = []
    turns = any(r.get("turn") for r in rows)
    for r in rows:
        said = {"none": "no passage", "full": "all as tokens"}.get(r["mode"]) or ("all compressed" if r["p"] == 0 else r["policy"])
        figures = [number(r["exact_match"], 3), number(r["f1"], 3)] + ([number(r["rouge_l"], 3)] if rouge else [])
        difference = [interval(r, "em_difference", "em_ci95")] if any(x.get("em_difference") is not None for x in rows) else []
        out.append([*([str(r["turn"] or "all")] if turns else []), number(r["distractors"], 0), str(r["k"] or "-"), number(r["p"], 2), said, *figures, *difference, str(r["n"])])
    head = [*(["turn"] if turns else []), "distractors", "k", "p", "chunks expanded by", "exact match", "F1", *(["ROUGE-L"] if rouge else [])]
    if any(x.get("em_difference") is not None for x in rows):
        head.append("exact match less the policy's")
    return markdown([*head, "n"], out)


def variants_table(results):
    out = []
    for path in sorted(results.glob("variant-*.json")):
        result = json.loads(path.read_text())
        at = {(r["mode"], r["k"]): r for r in result["rows"]}
        for k in sorted({k for _, k in at if k}):
            r = at["refrag", k]
            out.append([result["table"].removeprefix("variant-"), str(k), number(at["none", None]["log_perplexity"], 3),
                        f"{number(r['log_perplexity'], 3)} ({number(r['share_recovered'], 2)})", number(at["full", None]["log_perplexity"], 3)])
    return markdown(["variant, text", "k", "none", "refrag", "full"], out) if out else NOT_MEASURED


def regularisation_table(results):
    out = []
    for path in sorted(results.glob("regularisation-*.json")):
        result = json.loads(path.read_text())
        at = {r["mode"]: r for r in result["rows"]}
        out.append([result["table"].removeprefix("regularisation-"), *(number(at[m]["log_perplexity"], 3) for m in ("none", "full")), number(at["full"]["standard_error"], 3)])
    return markdown(["continued", "no context", "256 tokens of context", "s.e."], out) if out else NOT_MEASURED


NOT_MEASURED = "(not measured)"
SUMMARIES = {"variants": variants_table, "regularisation": regularisation_table}  # of several files
WITH_ROUGE = ("fairytaleqa", "medquad", "scitldr", "qmsum")


def draw_up(name, results):
    """The markdown of one table, of what is in the folder `results`."""
    if name in SUMMARIES:
        return SUMMARIES[name](results)
    path = results / f"{name}.json"
    if not path.exists():
        return NOT_MEASURED
    rows = json.loads(path.read_text())["rows"]
    if name.startswith("perplexity-"):
        return perplexity_table(rows)
    if name.startswith("selection-"):
        return selection_table(rows, "the paper's policy" if "text-policy" in name else "the shipped policy")
    return qa_table(rows, name in WITH_ROUGE)


def fill(text, card, names, results):
    """The card with each table between <!-- table NAME --> and <!-- end --> drawn up anew."""
    out, at = [], 0
    while (begin := text.find("<!-- table ", at)) >= 0:
        end_of_mark = text.find("-->", begin) + 3
        name, end = text[begin + len("<!-- table ") : end_of_mark - 3].strip(), text.find("<!-- end -->", begin)
        if name not in SUMMARIES and name not in names:
            raise SystemExit(f"evidence.py: {card}: table {name}: expected one of {', '.join([*SUMMARIES, *names])}")
        if end < 0:
            raise SystemExit(f"evidence.py: {card}: table {name}: expected <!-- end --> after it, found none")
        out += [text[at:end_of_mark], "\n", draw_up(name, results), "\n"]
        at = end
    return "".join(out) + text[at:]


def main():
    parser = argparse.ArgumentParser(description="Measures the default model and draws up the tables of its card.")
    parser.add_argument("what", choices=["run", "tables", "list"])
    parser.add_argument("names", nargs="*", help="tables to measure (default: all); a name stands for all that begin with it")
    parser.add_argument("--binary", default=str(ROOT / "build/refrag"))
    parser.add_argument("--model", type=Path, default=ROOT / "weights_tools/refrag-nano")
    parser.add_argument("--data", type=Path, default=ROOT / "build/train/data/test", help="held-out texts and questions, made by prepare.py")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/nano", help="where the tables are written and read")
    parser.add_argument("--card", type=Path, default=ROOT / "weights_tools/refrag-nano/README.md")
    parser.add_argument("--variants", type=Path, default=ROOT / "build/train/variants")
    parser.add_argument("--regularisation", type=Path, default=ROOT / "build/train/regularisation")
    options = parser.parse_args()
    wanted = tables(options.data, options.variants, options.regularisation)
    if options.what == "list":
        print("\n".join(wanted))
        return
    if options.what == "run":
        if not options.data.exists():
            parser.error(f"--data {options.data}: no such folder; make it with weights_tools/train/prepare.py")
        names = [n for n in wanted if not options.names or any(n.startswith(w) for w in options.names)]
        if not names:
            parser.error(f"expected names out of {', '.join(wanted)}; found {', '.join(options.names)}")
        for name in names:
            if wanted[name][1] == "text" and not (options.model / "policy-text.safetensors").exists():
                print(f"{name}: left out, {shown(options.model)} has no policy-text.safetensors", flush=True)
                continue
            print(name, flush=True)
            measure(name, *wanted[name], options)
        figures = [str(p) for p in sorted(options.results.glob("*.json"))]
        if figures and subprocess.run([sys.executable, ROOT / "bench/plot.py", *figures]).returncode:
            print("evidence.py: the tables are there, the figures are not", file=sys.stderr)
    card = options.card.read_text(encoding="utf-8")
    filled = fill(card, options.card, wanted, options.results)
    if filled != card:
        options.card.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
