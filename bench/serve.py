#!/usr/bin/env python3
"""Loads `refrag serve` and llama.cpp's server with the same chats, over the same decoder, in turn in one run. Python alone.

    python3 bench/serve.py --gguf FILE.gguf --llama-server PATH [--documents-model build/refrag-smol]

Loads: `short` (chats of about 200 tokens), `passages` (about 1500: ten passages as text, and a question), and with
--documents-model `documents`: the same ten passages as "documents" to that model, which reads of them what it chooses;
llama.cpp's server reads them as text there too. Each answer is 32 tokens, greedy, streamed, over a connection that its
client keeps. A closed loop: each client sends its next request when it has its answer. No two requests begin alike after
the template, so that no server can take over a prompt that it has read; passages come from a pool of 40.
All servers run all the time, one of them loaded at a time, each round in another order. A cell is the median of the
rounds. Ratios say how many times as fast refrag is: above 1 it is faster.
"""
import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time

PEER = "{llama_server} -m {model} --host 127.0.0.1 --port {port} -np {parallel} -c {total_context} -t {threads}"
OUTPUT_TOKENS = 32
POOL, PASSAGES = 40, 10
PLACES = "Alder Birch Cedar Dover Elder Fern Garnet Harbor Iron Juniper Kent Linden Maple North Oak Pine".split()
THINGS = "tower bridge market museum garden school library harbor castle station".split()
TRADES = "carpenters bakers sailors farmers painters teachers weavers miners".split()
GOODS = "paper glass bread silk copper salt wool clocks boats honey".split()
FACTS = (
    "The {thing} of {place} was built in {year} by the {trade} of the town.",
    "Most of the {goods} that is sold in {place} comes by boat in the spring.",
    "In {year} a fire took the old {thing}, and the people built it again in stone.",
    "The {trade} of {place} meet at the {thing} on the first day of each month.",
    "A road of {number} miles goes from {place} to the sea.",
    "About {number} visitors come each week to see how the {goods} is made.",
    "The town gave the {thing} a new roof in {year}, and it has not rained in since.",
    "Old letters say that {place} once had {number} wells and a wall.",
)


def sentence(draw):
    return draw.choice(FACTS).format(
        thing=draw.choice(THINGS), place=draw.choice(PLACES), trade=draw.choice(TRADES), goods=draw.choice(GOODS),
        year=draw.randint(1400, 1999), number=draw.randint(20, 980))  # fmt: skip


def passage_pool():
    draw = random.Random(1)
    return [" ".join(sentence(draw) for _ in range(8)) for _ in range(POOL)]


def question(draw):
    return f"What is known about the {draw.choice(THINGS)} of {draw.choice(PLACES)} and its {draw.choice(TRADES)}?"


def make_bodies(load, count, seed):
    """For each request {"text": body, "documents": body}: both say the same."""
    draw = random.Random(seed)
    pool = passage_pool()
    bodies = []
    for _ in range(count):
        asked = question(draw)
        common = {"max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
                  "stream_options": {"include_usage": True}}  # fmt: skip
        if load == "short":
            text = f"Note {draw.randint(0, 10**9)}. " + " ".join(sentence(draw) for _ in range(7)) + "\n" + asked
            bodies.append({"text": {**common, "messages": [{"role": "user", "content": text}]}})
            continue
        chosen = draw.sample(pool, PASSAGES)
        text = f"Note {draw.randint(0, 10**9)}.\n" + "\n".join(chosen) + "\n" + asked
        bodies.append({
            "text": {**common, "messages": [{"role": "user", "content": text}]},
            "documents": {**common, "messages": [{"role": "user", "content": asked}], "documents": chosen},
        })  # fmt: skip
    return bodies


# ---- HTTP ----------------------------------------------------------------------------------------------------


class Connection:
    """One connection to a server, opened again where the server closes it."""

    def __init__(self, port):
        self.port = port
        self.reader = self.writer = None

    def close(self):
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def request(self, method, path, body=None):
        """(status, asynchronous iterator over the body's parts as they come)"""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        while True:
            is_new = self.writer is None
            if is_new:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                self.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                await self.writer.drain()
                status = int((await self.reader.readuntil(b"\r\n")).split()[1])
                break
            except (ConnectionError, asyncio.IncompleteReadError):
                self.close()
                if is_new:
                    raise
        headers = {}
        while (line := (await self.reader.readuntil(b"\r\n")).strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip().lower()
        return status, self.parts(headers)

    async def parts(self, headers):
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
        else:
            while part := await self.reader.read(1 << 16):
                yield part
            self.close()
        if headers.get("connection") == "close":
            self.close()


async def chat(connection, body):
    """{"ttft", "total": seconds, "prompt", "completion": tokens}"""
    started = time.perf_counter()
    status, parts = await connection.request("POST", "/v1/chat/completions", body)
    if status != 200:
        raise RuntimeError(f"status {status}: {b''.join([part async for part in parts])[:300]!r}")
    answer = {"ttft": None}
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise RuntimeError(f"in the stream: {event['error']}")
            if answer["ttft"] is None and any(choice["delta"].get("content") for choice in event.get("choices", [])):
                answer["ttft"] = time.perf_counter() - started
            if event.get("usage"):
                answer["prompt"] = event["usage"]["prompt_tokens"]
                answer["completion"] = event["usage"]["completion_tokens"]
    answer["total"] = time.perf_counter() - started
    if answer["ttft"] is None or answer.get("completion") != OUTPUT_TOKENS:
        raise RuntimeError(f"expected {OUTPUT_TOKENS} tokens and their usage, found {answer}")
    return answer


async def load_with(port, bodies, n_clients):
    """{"requests_s", "tokens_s", "ttft_p50_ms", "ttft_p95_ms", "prompt_tokens"}"""
    waiting = list(reversed(bodies))
    answers = []

    async def client():
        connection = Connection(port)
        while waiting:
            answers.append(await chat(connection, waiting.pop()))
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    seconds = time.perf_counter() - started
    ttft = sorted(answer["ttft"] * 1000 for answer in answers)
    return {
        "requests_s": len(answers) / seconds,
        "tokens_s": sum(answer["completion"] for answer in answers) / seconds,
        "ttft_p50_ms": percentile(ttft, 0.50),
        "ttft_p95_ms": percentile(ttft, 0.95),
        "prompt_tokens": statistics.median(answer["prompt"] for answer in answers),
    }


def percentile(ordered, share):
    """Of a list in order: the least value that so large a share does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# ---- servers -------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    def __init__(self, name, command, port, log):
        self.name, self.port, self.log = name, port, log
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    async def ready(self, seconds):
        """Waits until the model is loaded: then /health says ok."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                connection = Connection(self.port)
                status, parts = await connection.request("GET", "/health")
                text = b"".join([part async for part in parts])
                connection.close()
                if status == 200 and b"ok" in text:
                    return
            except (OSError, asyncio.IncompleteReadError):
                pass
            await asyncio.sleep(0.1)
        with open(self.log, encoding="utf-8", errors="replace") as file:
            raise RuntimeError(f"{self.name} does not start: {file.read()[-1000:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_servers(arguments, folder):
    """The servers by the names of the table's columns."""
    parallel = max(arguments.clients)
    servers = {}

    def start(name, command, port):
        servers[name] = Server(name, command, port, os.path.join(folder, f"{name}.log"))

    def refrag(name, model):
        port = free_port()
        start(name, [arguments.refrag, "serve", "-m", model, "--port", str(port), "--parallel", str(parallel), "-c",
                     str(arguments.context), "-t", str(arguments.threads)], port)  # fmt: skip

    refrag("refrag", arguments.gguf)
    port = free_port()
    # Words are cut before they are filled in, so that a path may have spaces.
    values = {"llama_server": arguments.llama_server or "", "model": arguments.gguf, "port": port, "parallel": parallel,
              "total_context": parallel * arguments.context, "threads": arguments.threads}  # fmt: skip
    start("llama-server", [word.format(**values) for word in shlex.split(arguments.peer)], port)
    if arguments.documents_model:
        refrag("documents", arguments.documents_model)
    return servers


# ---- the run -------------------------------------------------------------------------------------------------


def contestants(load):
    """(server, form of the request) of refrag, then of its peer."""
    if load == "documents":
        return [("documents", "documents"), ("llama-server", "text")]
    return [("refrag", "text"), ("llama-server", "text")]


async def measure(arguments, servers):
    """{(load, clients): {server: [a figure for each round]}}"""
    for server in servers.values():
        await server.ready(arguments.start_seconds)
    results = {(load, n): {} for load in arguments.loads for n in arguments.clients}
    for turn in range(-1, arguments.rounds):  # the first only warms up
        for load, n_clients in results:
            count = n_clients if turn < 0 else max(arguments.least_requests, arguments.requests * n_clients)
            bodies = make_bodies(load, count, seed=f"{turn} {load} {n_clients}")
            order = contestants(load)
            for name, form in order if turn % 2 == 0 else reversed(order):
                figures = await load_with(servers[name].port, [body[form] for body in bodies], n_clients)
                if turn >= 0:
                    results[load, n_clients].setdefault(name, []).append(figures)
                    print(f"round {turn + 1}, {load}, {n_clients} clients, {name}: {figures['requests_s']:.2f} requests/s, "
                          f"TTFT {figures['ttft_p50_ms']:.0f} ms", file=sys.stderr)  # fmt: skip
    return results


def medians(rounds):
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def three_digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(results):
    lines = [
        "| load | clients | | prompt tokens | requests/s | tokens/s | TTFT p50, ms | TTFT p95, ms |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (load, n_clients), by_server in results.items():
        ours, theirs = (medians(by_server[name]) for name, _ in contestants(load))
        for title, figures in (("refrag", ours), ("llama-server", theirs)):
            cells = [f"{figures['prompt_tokens']:.0f}"] + [
                three_digits(figures[key]) for key in ("requests_s", "tokens_s", "ttft_p50_ms", "ttft_p95_ms")]  # fmt: skip
            lines.append(f"| {load} | {n_clients} | {title} | " + " | ".join(cells) + " |")
        ratios = [ours[key] / theirs[key] for key in ("requests_s", "tokens_s")]
        ratios += [theirs[key] / ours[key] for key in ("ttft_p50_ms", "ttft_p95_ms")]
        lines.append(f"| {load} | {n_clients} | **ratio** | | " + " | ".join(f"**{ratio:.2f}**" for ratio in ratios) + " |")
    return "\n".join(lines)


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"^model name\s*: (.*)$", file.read(), re.M)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def numbers(text):
    return [int(number) for number in text.split(",")]


def words(text):
    return text.split(",")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--gguf", required=True, help="the decoder of both servers")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--peer", default=PEER, help="its command (%(default)s)")
    parser.add_argument("--documents-model", help="a refrag model over the same decoder, for the load `documents`")
    parser.add_argument("--clients", type=numbers, default=[1, 4, 16])
    parser.add_argument("--loads", type=words, help="of short, passages, documents (all that can be)")
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--least-requests", type=int, default=12, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=2560, help="positions of a request")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--start-seconds", type=float, default=120)
    parser.add_argument("--logs", default="/tmp", help="a folder for what the servers print")
    parser.add_argument("--json", help="write every round's figures here")
    arguments = parser.parse_args()
    if "{llama_server}" in arguments.peer and not arguments.llama_server:
        parser.error("expected --llama-server, or a --peer without {llama_server}")
    known = ["short", "passages"] + (["documents"] if arguments.documents_model else [])
    arguments.loads = arguments.loads or known
    if not set(arguments.loads) <= set(known):
        parser.error(f"--loads: expected some of {', '.join(known)}, found {', '.join(arguments.loads)}")
    servers = start_servers(arguments, arguments.logs)
    try:
        results = asyncio.run(measure(arguments, servers))
    except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
        sys.exit(f"serve.py: {error} ({arguments.logs}/*.log)")
    finally:
        for server in servers.values():
            server.stop()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            rows = [{"load": load, "clients": n, "rounds": by_server} for (load, n), by_server in results.items()]
            json.dump(rows, file, indent=1)
            file.write("\n")
    print(f"{processor()}, {arguments.threads} threads; {OUTPUT_TOKENS} tokens an answer; medians of {arguments.rounds} rounds; "
          "ratio: how many times as fast refrag is\n")  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    main()
