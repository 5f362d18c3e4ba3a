"""Draws what bench/evidence.py measured: log-perplexity against context length, against the share of chunks expanded for each way
of choosing them (the paper's Figure 3), and exact match against the number of passages. Called by plot.py."""

import os

ORDER = ("model", "perplexity-desc", "random", "perplexity-asc")


def lines_of(rows, x, y, name):
    """{line's name: [(x, y), ...]}, x ascending; rows without a figure, and those that `name` gives None, are left out."""
    lines = {}
    for row in rows:
        said = name(row)
        if said and row[x] is not None and row[y] is not None:
            lines.setdefault(said, []).append((row[x], row[y]))
    return {said: sorted(points) for said, points in lines.items()}


def perplexity(rows):
    def name(row):
        return {"none": "no context", "full": "full context"}.get(row["mode"]) or (f"k = {row['k']}" if row["mode"] == "refrag" else f"last, k = {row['k']}")

    return lines_of(rows, "context", "log_perplexity", name), "context, tokens", "log-perplexity, nats a token", True


def selection(rows):
    def name(row):
        return row["policy"] if row["mode"] == "refrag" else "last" if row["mode"] == "last" else None

    return lines_of(rows, "p", "log_perplexity", name), "share of chunks expanded, p", "log-perplexity, nats a token", False


def passages(rows):
    rows = [{**row, "passages": row["distractors"] + 1} for row in rows if row["distractors"] is not None]

    def name(row):
        return "all as tokens" if row["mode"] == "full" else f"p = {row['p']:g}" if row["policy"] in (None, "model") else None

    return lines_of(rows, "passages", "exact_match", name), "passages", "exact match", True


KINDS = (("perplexity-", perplexity), ("selection-", selection), ("facts-passages", passages))


def of(result):
    """What draws a table of evidence.py, or None where it has no figure."""
    return next((draws for start, draws in KINDS if result["table"].startswith(start)), None)


def draw(result, path):
    """Writes the figure of one table beside its file; returns the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "refrag"  # the same input gives the same file
    lines, x_label, y_label, logarithmic = of(result)(result["rows"])
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in sorted(lines, key=lambda said: (ORDER.index(said) if said in ORDER else len(ORDER), said)):
        dashed = name.startswith(("last", "no context", "full", "all as"))
        axis.plot(*zip(*lines[name]), marker="o", markersize=4, linestyle="--" if dashed else "-", label=name)
    if logarithmic:
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(x) for x in ticks])
        axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize="small")
    axis.set_title(f"{result['table']} ({result['model']})", fontsize="medium")
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        written.append(f"{os.path.splitext(path)[0]}.{kind}")
        figure.savefig(written[-1], dpi=150, metadata=metadata)
    pyplot.close(figure)
    return written
