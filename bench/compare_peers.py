#!/usr/bin/env python3
"""Times refrag beside other runtimes' llama-bench: the same shapes, the same tests, in turn in one run, so that a machine
that changes its speed changes everybody's. compare.md says how to build the peers and has the figures. Python alone.

    python3 bench/compare_peers.py --peer llama.cpp=PATH --peer ik_llama.cpp=PATH --models DIR

DIR holds 160m-bf16.gguf, 160m-q8_0.gguf, 1.1b-bf16.gguf, 1.1b-q8_0.gguf (make_gguf.py, llama-quantize). A test is ppN (read N
tokens at once: tokens/s), tgN or tgN@D (generate N tokens after D others: tokens/s), or ttftN: seconds to the first token
after N tokens of context, beside REFRAG's with the passages cached and nothing expanded, k = 16 and 32.
Every program takes part with each of its variants of options in every round; a cell is the best variant's median.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys

SHAPES = {"160m": "llama-160m", "1.1b": "tinyllama-1.1b"}
WEIGHTS = {"bf16": "auto", "q8_0": "int8"}  # the files' names, refrag's --weights
TESTS = ["pp512", "pp2048", "tg64", "tg64@8192"]
VARIANTS = {
    "llama.cpp": [["-fa", "on"], ["-fa", "off"]],
    "ik_llama.cpp": [["-fa", "1"], ["-fa", "1", "-rtr", "1"]],
}


def parse_test(name):
    """(kind, tokens, depth)"""
    match = re.fullmatch(r"(pp|tg|ttft)(\d+)(?:@(\d+))?", name)
    if match is None or (match[3] is not None and match[1] != "tg"):
        sys.exit(f"compare_peers: expected ppN, tgN, tgN@D or ttftN, found {name!r}")
    return match[1], int(match[2]), int(match[3] or 0)


def output_of(command):
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, text=True)
    if run.returncode != 0:
        sys.exit(f"compare_peers: {' '.join(command)}: exit code {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout


def run_peer(name, binary, options, model, threads, test):
    """Tokens a second."""
    kind, tokens, depth = test
    command = [binary, "-m", model, "-t", str(threads), "-r", "1", "-o", "json", *options]
    if kind != "tg":
        command += ["-p", str(tokens), "-n", "0"]
    elif depth == 0:
        command += ["-p", "0", "-n", str(tokens)]
    elif name == "ik_llama.cpp":  # knows no depth, but a generation after a prompt
        command += ["-p", "0", "-n", "0", "-gp", f"{depth},{tokens}"]
    else:
        command += ["-p", "0", "-n", str(tokens), "-d", str(depth)]
    text = output_of(command)
    rows = json.loads(text[re.search(r"^\[", text, re.M).start() :])  # some versions print a warning before it
    return rows[-1]["avg_ts"]


def run_refrag(binary, shape, weights, threads, test):
    """({case: figure}, machine): tokens a second, or seconds."""
    kind, tokens, depth = test
    context = max(depth, 16) if kind == "tg" else tokens
    command = [binary, "bench", "-t", str(threads), "--shape", SHAPES[shape], "--weights", WEIGHTS[weights], "-o", "json"]
    command += ["--context", str(context), "--from", "cached", "--repeats", "1", "-n", str(tokens) if kind == "tg" else "2"]
    command += ["-k", "16,32", "-p", "0"] if kind == "ttft" else ["--modes", "full"]
    report = json.loads(output_of(command))
    figures = {}
    for row in report["rows"]:
        case = "refrag" if row["mode"] == "full" else f"refrag, k = {row['k']}"
        if kind == "tg":
            figures[case] = 1000 / row["ttit_ms"]
        elif kind == "pp":
            figures[case] = 1000 * row["positions"] / row["ttft_ms"]
        else:
            figures[case] = row["ttft_ms"] / 1000
    return figures, report["machine"]


def measure(args, peers, shape, weights, test):
    """{case: [figure of each round]}, machines"""
    figures, machines = {}, []
    for _ in range(args.rounds):
        ours, machine = run_refrag(args.refrag, shape, weights, args.threads, test)
        machines.append(machine)
        for case, figure in ours.items():
            figures.setdefault((case, ""), []).append(figure)
        for name, binary in peers:
            for options in VARIANTS.get(name, [[]]):
                model = f"{args.models}/{shape}-{weights}.gguf"
                speed = run_peer(name, binary, options, model, args.threads, test)
                figure = test[1] / speed if test[0] == "ttft" else speed
                figures.setdefault((name, " ".join(options)), []).append(figure)
    return figures, machines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a llama-bench; again for more")
    parser.add_argument("--models", required=True, help="directory of the GGUF files")
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default="160m,1.1b")
    parser.add_argument("--weights", default="bf16,q8_0")
    parser.add_argument("--tests", default=",".join(TESTS))
    args = parser.parse_args()
    peers = [peer.split("=", 1) for peer in args.peer]
    names = ["refrag"] + [name for name, _ in peers]
    print("| shape | weights | test | " + " | ".join(names) + " | refrag / best peer | memory read, bf16 peak |", flush=True)
    print("|---" * (len(names) + 5) + "|")
    for shape in args.shapes.split(","):
        for weights in args.weights.split(","):
            for name in args.tests.split(","):
                test = parse_test(name)
                figures, machines = measure(args, peers, shape, weights, test)
                lower = test[0] == "ttft"
                best, spreads = {}, {}
                for (case, options), rounds in figures.items():
                    median = statistics.median(rounds)
                    if case not in best or (median < best[case][0]) == lower:
                        best[case] = (median, options)
                        spreads[case] = (max(rounds) - min(rounds)) / median
                against = [best[peer][0] for peer, _ in peers]
                against = (min(against) if lower else max(against)) if against else None
                for ours in [case for case in best if case.startswith("refrag")]:
                    cells = []
                    for column in [ours, *names[1:]]:
                        median, options = best[column]
                        text = f"{median:.3g} s" if lower else f"{median:.0f}" if median >= 100 else f"{median:.1f}"
                        cells.append(text + (f" ({options})" if options else "") + f" +-{spreads[column] / 2:.0%}")
                    if against is None:
                        ratio = "-"
                    else:
                        ratio = f"{against / best[ours][0] if lower else best[ours][0] / against:.2f}x"
                    read = statistics.median(machine["read_gbs"] for machine in machines)
                    peak = statistics.median(machine["peak_bf16_gflops"] for machine in machines)
                    label = name + ours.removeprefix("refrag")
                    print(f"| {shape} | {weights} | {label} | " + " | ".join(cells) + f" | {ratio} | {read:.1f} GB/s, {peak:.0f} GFLOP/s |", flush=True)


if __name__ == "__main__":
    main()
