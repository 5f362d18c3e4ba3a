#!/usr/bin/env python3
"""Draws what `refrag bench -o json` measured as the paper's Figures 2, 8 and 9 do: how many times sooner the
first token comes (TTFT), how many times sooner each further one (TTIT), and how many times more tokens a second
(throughput), against the length of the context, one line for each chunk length.

    refrag bench -o json --out bench.json
    python3 bench/plot.py bench.json --out bench          # bench.png and bench.svg

Tables of bench/evidence.py are drawn each beside its own file instead (plot_evidence.py).

Several files are drawn as one where they hold different rows (a sweep in parts); rows that two files both hold
are refused, because there is no telling which is meant. Needs matplotlib alone, and no display.
"""

import argparse
import json
import os
import sys

import plot_evidence

METRICS = (
    ("ttft_ratio", "TTFT acceleration"),
    ("ttit_ratio", "TTIT acceleration"),
    ("throughput_ratio", "throughput acceleration"),
)
ROW_KEYS = ("mode", "context", "k", "p", "cached", "batch", "ttft_ratio", "ttit_ratio", "throughput_ratio")


class BadInput(Exception):
    """A file that is no result of `refrag bench -o json`; one line says which and why."""


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error})") from error


def draw_evidence(paths):
    """The figures of those of `paths` that are tables of evidence.py and have one; and the other paths."""
    written, others = [], []
    for path in paths:
        result = read_json(path)
        if not isinstance(result, dict) or "table" not in result:
            others.append(path)
        elif plot_evidence.of(result):
            try:
                written += plot_evidence.draw(result, path)
            except KeyError as error:
                raise BadInput(f"{path}: expected the key {error} in every row") from error
    return written, others


def read_rows(path):
    """The rows of one file, checked, and its machine."""
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise BadInput(f'{path}: expected the output of `refrag bench -o json`, an object with "rows"')
    machine = result.get("machine")
    for number, row in enumerate(result["rows"]):
        missing = [key for key in ROW_KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise BadInput(f'{path}: rows[{number}]: expected the key "{missing[0]}", found none')
    return result["rows"], machine if isinstance(machine, dict) else {}


def read_all(paths):
    rows, machines, seen = [], [], {}
    for path in paths:
        found, machine = read_rows(path)
        machines.append(machine)
        for row in found:
            if row["mode"] != "refrag":
                continue
            what = tuple(row[key] for key in ("context", "k", "p", "cached", "batch"))
            if what in seen:
                raise BadInput(f"{path}: context {what[0]}, k {what[1]}, p {what[2]} is in {seen[what]} too")
            seen[what] = path
            rows.append(row)
    return rows, machines


def choose(rows, p, batch):
    """The rows of one p and batch size; by default the smallest of each that there is."""
    if not rows:
        raise BadInput("no refrag rows to draw: run `refrag bench` with --modes full,refrag")
    shares, batches = sorted({row["p"] for row in rows}), sorted({row["batch"] for row in rows})
    p = shares[0] if p is None else p
    batch = batches[0] if batch is None else batch
    if p not in shares:
        raise BadInput(f"-p {p}: the rows have {', '.join(map(str, shares))}")
    if batch not in batches:
        raise BadInput(f"--batch {batch}: the rows have {', '.join(map(str, batches))}")
    return [row for row in rows if row["p"] == p and row["batch"] == batch], p, batch


def lines_of(rows, metric):
    """{(cached, k): [(context, ratio), ...]}, contexts ascending; rows without a ratio are left out."""
    lines = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        if row[metric] is not None:
            lines.setdefault((row["cached"], row["k"]), []).append((row["context"], row[metric]))
    return lines


def draw(rows, title, out):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "refrag"  # the same input gives the same file
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(13, 4.2), layout="constrained")
    lengths = sorted({row["k"] for row in rows})
    contexts = sorted({row["context"] for row in rows})
    drawn = 0
    for axis, (metric, name) in zip(axes, METRICS):
        for (cached, k), points in sorted(lines_of(rows, metric).items()):
            axis.plot(
                [context for context, _ in points],
                [ratio for _, ratio in points],
                color=f"C{lengths.index(k)}",
                linestyle="-" if cached else "--",
                marker="o" if cached else "x",
                markersize=4,
                label=f"k = {k}, {'cached' if cached else 'from text'}",
            )
            drawn += 1
        axis.axhline(1.0, color="0.6", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [str(context) for context in contexts])
        axis.minorticks_off()
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(f"{name} (times the full context)")
        axis.grid(alpha=0.3)
    if drawn == 0:
        raise BadInput("no row has a ratio: `refrag bench` needs --modes full,refrag")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[0].legend(handles, labels, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(f"{out}.{kind}", dpi=150, metadata=metadata)
        written.append(f"{out}.{kind}")
    pyplot.close(figure)
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draws the acceleration that `refrag bench -o json` measured.")
    parser.add_argument("results", nargs="+", metavar="FILE", help="output of `refrag bench -o json`, or tables of evidence.py")
    parser.add_argument("--out", metavar="NAME", help="written as NAME.png and NAME.svg (default: the first file's name)")
    parser.add_argument("-p", type=float, help="share of chunks expanded (default: the smallest there is)")
    parser.add_argument("--batch", type=int, help="requests at a time (default: the fewest there are)")
    options = parser.parse_args(arguments)
    try:
        written, results = draw_evidence(options.results)
        if not results:
            print(" ".join(written))
            return 0
        rows, machines = read_all(results)
        rows, p, batch = choose(rows, options.p, options.batch)
        named = {str(machine.get(key, "")) for machine in machines for key in ("model", "cpu")} - {""}
        title = ", ".join([*sorted(named), f"p = {p:g}", f"batch {batch}"])
        out = options.out or os.path.splitext(results[0])[0]
        written += draw(rows, title, out)
    except BadInput as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 3
    except ImportError as error:
        print(f"plot.py: {error}: install matplotlib (weights_tools/requirements.txt)", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"plot.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(" ".join(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
