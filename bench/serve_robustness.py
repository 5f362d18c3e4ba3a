#!/usr/bin/env python3
"""How `refrag serve` behaves under what clients do to servers, in figures.

    python3 bench/serve_robustness.py [-m weights_tools/refrag-nano] [--refrag build/refrag] [--rounds 10]

Measures: /health beside 1000 idle connections; how soon a slot is free after its client has left, in each phase; memory after bodies over the cap;
the longest wait of an answer for its next token while a long prompt is read beside it. Prints Markdown; needs Python alone.
"""
import argparse
import http.client
import json
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path


class Server:
    def __init__(self, args, *options):
        self.process = subprocess.Popen([args.refrag, "serve", "-m", args.model, "--port", "0", *options], stderr=subprocess.PIPE, text=True)
        self.port = None
        said = ""
        for line in self.process.stderr:
            said += line
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                break
        if self.port is None:
            raise SystemExit(f"{Path(sys.argv[0]).stem}: the server did not start: {said.strip()}")

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def metric(self, name):
        return float(re.search(rf"^{name} (.*)$", self.get("/metrics"), re.M)[1])

    def send(self, path, body):
        """A connection on which this request has been sent."""
        made = socket.create_connection(("127.0.0.1", self.port))
        text = json.dumps(body).encode()
        made.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        return made

    def memory(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def wait_until(true_now, seconds=30):
    begun = time.monotonic()
    while not true_now():
        if time.monotonic() - begun > seconds:
            raise SystemExit("serve_robustness: waited in vain")
        time.sleep(0.001)
    return (time.monotonic() - begun) * 1000


def idle_connections(args):
    with Server(args, "--max-connections", "1100") as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        wait_until(lambda: server.metric("refrag_http_connections") >= 1000)
        busy = [server.send("/v1/completions", LONG) for _ in range(8)]
        ms = []
        for _ in range(100):
            begun = time.monotonic()
            server.get("/health")
            ms.append((time.monotonic() - begun) * 1000)
        for one in idle + busy:
            one.close()
    print(f"| `/health`, 1000 connections idle and 8 requests under way, 100 times | median {statistics.median(ms):.1f} ms, longest {max(ms):.1f} ms |", flush=True)


LONG = {"prompt": "Once", "ignore_eos": True, "max_tokens": 1900}


def leavers(args):
    text = " ".join(f"w{i % 100}" for i in range(200))
    encoding = {"messages": [{"role": "user", "content": "x"}], "expand_fraction": 0, "documents": [f"{{}} {i} {text}" for i in range(45)]}

    def fresh(number):
        return {**encoding, "documents": [one.format(number) for one in encoding["documents"]]}

    with Server(args, "--parallel", "1", "--queue", "8") as server:
        def pending():
            return server.metric("refrag_requests_pending")

        def measured(name, make, wanted, blocker=False):
            ms = []
            for i in range(args.rounds):
                first = server.send("/v1/completions", LONG) if blocker else None
                if blocker:
                    wait_until(lambda: pending() == 1)
                client = server.send(*make(f"{name}{i}"))
                wait_until(lambda: pending() == wanted)
                time.sleep(0.05)
                client.close()
                ms.append(wait_until(lambda: pending() == wanted - 1))
                if blocker:
                    first.close()
                    wait_until(lambda: pending() == 0)
            print(f"| a client leaves {name}: until its place is free, {args.rounds} times | median {statistics.median(ms):.0f} ms, longest {max(ms):.0f} ms |",
                  flush=True)

        measured("while it is answered", lambda _: ("/v1/completions", LONG), 1)
        measured("a stream", lambda _: ("/v1/completions", {**LONG, "stream": True}), 1)
        measured("while its passages are encoded", lambda n: ("/v1/chat/completions", fresh(n)), 1)
        measured("in the queue", lambda _: ("/v1/completions", LONG), 2, blocker=True)


def large_bodies(args):
    with Server(args, "--max-body", "4") as server:
        server.get("/health")
        before = server.memory()
        after = before
        for _ in range(5):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.request("POST", "/v1/completions", b"x" * (200 << 20), {"Content-Type": "application/json"})
                status = connection.getresponse().status
            except OSError:
                status = 0
            after = max(after, server.memory())
    print(f"| five bodies of 200 MB, cap 4 MiB | {status}, memory {before:.0f} to {after:.0f} MiB |", flush=True)


def gaps(args):
    """Longest times between an answer's tokens: alone, and while long prompts are read beside it."""
    words = "the river ran on under the old bridge " * 220
    for step_ms in (10, 50, 1000):
        with Server(args, "--parallel", "4", "--step-ms", str(step_ms)) as server:
            found = {}
            for beside in (False, True):
                answer = server.send("/v1/completions", {**LONG, "stream": True})
                done = threading.Event()
                read = []

                def disturb():
                    number = 0
                    while not done.is_set():
                        number += 1
                        other = server.send("/v1/completions", {"prompt": f"{step_ms} {number} {words}", "max_tokens": 1})
                        if b" 200 OK" not in other.recv(1 << 16):
                            raise SystemExit("serve_robustness: a prompt was refused")
                        other.close()
                        read.append(number)

                thread = threading.Thread(target=disturb) if beside else None
                if thread:
                    thread.start()
                answer.recv(1 << 16)
                longest, last, n = 0.0, time.monotonic(), 0
                while n < 400:
                    if not answer.recv(1 << 16):
                        break
                    now = time.monotonic()
                    longest, last, n = max(longest, now - last), now, n + 1
                done.set()
                if thread:
                    thread.join()
                answer.close()
                found[beside] = longest * 1000
                if beside:
                    found["prompts"] = len(read)
        print(f"| longest wait for a token, `--step-ms {step_ms}`: alone, beside {found['prompts']} prompts of 1,760 words | {found[False]:.0f} ms, {found[True]:.0f} ms |",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="weights_tools/refrag-nano")
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    print("| what | figure |\n|---|---|")
    idle_connections(args)
    leavers(args)
    large_bodies(args)
    gaps(args)


if __name__ == "__main__":
    main()
