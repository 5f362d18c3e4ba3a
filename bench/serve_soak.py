#!/usr/bin/env python3
"""Mixed load with random disconnects on `refrag serve`, for as long as one likes: is anything lost, does memory stay?

    python3 bench/serve_soak.py [-m weights_tools/refrag-nano] [--refrag build/refrag] [--seconds 7200] [--clients 8] [--seed 1]

Best with a binary built by `make CUDA=0 SAN=address build/san-address/refrag`: whatever it reports ends the run. Every client sends one request after
another of every kind, good and bad; two of five are broken off somewhere, in the request, before the answer or in it. What is not broken off must be
answered whole: with what the same request was answered at the start, or with the status that it deserves (429 where the queue is full). At the end nothing
may be pending and no page used. Prints Markdown, a line a minute on standard error; exits with 1 where something is wrong. Needs Python alone.
"""
import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import sys
import threading
import time

from serve_robustness import Server, wait_until

WORDS = "the old mill on the river was built by a farmer who sold bread and flour to the town near the bridge in winter".split()
MOST_IDLE_SECONDS = 120


def request(method, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


class Kinds:
    """Requests by name. Those of `fixed` are always answered alike."""

    def __init__(self):
        rng = random.Random(0)
        documents = [{"id": f"d{i}", "title": f"Part {i}", "text": sentence(rng, 60)} for i in range(6)]
        question = [{"role": "user", "content": "Who built the mill?"}]
        self.fixed = {
            "chat": request("POST", "/v1/chat/completions", {"messages": question, "documents": documents, "max_tokens": 24}),
            "chat, a stream": request("POST", "/v1/chat/completions", {"messages": question, "documents": documents, "max_tokens": 24, "stream": True}),
            "chat, log-probabilities": request("POST", "/v1/chat/completions", {"messages": question, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}),
            "completion": request("POST", "/v1/completions", {"prompt": sentence(rng, 20), "max_tokens": 60, "ignore_eos": True}),
            "completion, seed": request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 40, "temperature": 1.0, "seed": 7, "n": 2}),
            "echo": request("POST", "/v1/completions", {"prompt": sentence(rng, 30), "max_tokens": 1, "echo": True, "logprobs": 2}),
            "Cohere's chat": request("POST", "/v2/chat", {"messages": question, "documents": documents[:3], "max_tokens": 16, "stream": True}),
            "embeddings": request("POST", "/v1/embeddings", {"input": [sentence(rng, 40), sentence(rng, 5)]}),
            "tokenize": request("POST", "/tokenize", {"content": sentence(rng, 10)}),
            "models": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
            "no such field": request("POST", "/v1/completions", {"prompt": "x", "best_of": 3}),
            "broken JSON": request("POST", "/v1/completions", b'{"prompt": '),
            "too long": request("POST", "/v1/completions", {"prompt": "mill " * 20000}),
            "no such path": b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n",
        }

    def draw(self, rng):
        if rng.random() < 0.6:
            name = rng.choice(list(self.fixed))
            return name, self.fixed[name], True
        name = rng.choice(["fresh passages", "a long answer", "a long prompt", "put", "delete", "a deadline", "a large body", "metrics", "health"])
        if name == "fresh passages":
            documents = [sentence(rng, 80) for _ in range(rng.randint(1, 12))]
            return name, request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "What?"}], "documents": documents, "max_tokens": 12}), False
        if name == "a long answer":
            return name, request("POST", "/v1/completions", {"prompt": sentence(rng, 3), "max_tokens": 600, "ignore_eos": True, "stream": rng.random() < 0.5}), False
        if name == "a long prompt":
            return name, request("POST", "/v1/completions", {"prompt": sentence(rng, 1200), "max_tokens": 4}), False
        if name == "put":
            return name, request("PUT", f"/v1/passages/p{rng.randint(0, 49)}", {"title": "P", "text": sentence(rng, 100)}), False
        if name == "delete":
            return name, f"DELETE /v1/passages/p{rng.randint(0, 49)} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), False
        if name == "a deadline":
            return name, request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "timeout": 0.05}), False
        if name == "a large body":
            return name, request("POST", "/v1/completions", {"prompt": "x" * (5 << 20)}), False
        return name, f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), False


ALLOWED = {"fresh passages": {200}, "a long answer": {200}, "a long prompt": {200}, "put": {200, 201}, "delete": {200, 204, 404}, "a deadline": {200, 504},
           "a large body": {413}, "metrics": {200}, "health": {200}}


def core(body):
    """What of an answer is always alike: its text and what belongs to it, without times and ids."""
    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("id", "created", "refrag", "generation_id", "cached_tokens")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    def texts(value, found):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in ("content", "text") and isinstance(inner, str):
                    found.append(inner)
                else:
                    texts(inner, found)
        elif isinstance(value, list):
            for inner in value:
                texts(inner, found)

    if not body.startswith((b"data:", b"event:")):
        return json.dumps(strip(json.loads(body)), sort_keys=True)
    # Where a stream is cut depends on what else runs: what it says does not.
    found = []
    for line in body.decode().splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            texts(json.loads(line[6:]), found)
    return "".join(found)


def whole(connection):
    """(status, body) of an answer that is read to its end; raises where it is cut short."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def leave(rng, port, data):
    """Breaks off somewhere."""
    with socket.create_connection(("127.0.0.1", port), timeout=MOST_IDLE_SECONDS) as connection:
        where = rng.random()
        if where < 0.2:
            connection.sendall(data[: rng.randint(0, len(data) - 1)])
            time.sleep(rng.random() * 0.05)
            return
        connection.sendall(data)
        if where < 0.6:
            time.sleep(rng.random() * 0.5)
            return
        for _ in range(rng.randint(1, 20)):
            if not connection.recv(rng.randint(1, 400)):
                return


class Run:
    def __init__(self, args, server):
        self.args, self.server, self.kinds = args, server, Kinds()
        self.lock = threading.Lock()
        self.faults, self.counts = [], {"whole": 0, "broken off": 0, "queue full": 0}
        self.by_kind, self.stop = {}, threading.Event()
        self.expected = {}

    def ask(self, data):
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=MOST_IDLE_SECONDS) as connection:
            try:
                connection.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a body that is refused before it is read
            return whole(connection)

    def learn(self):
        for name, data in self.kinds.fixed.items():
            status, body = self.ask(data)
            self.expected[name] = (status, core(body))

    def count(self, key, name=None):
        with self.lock:
            self.counts[key] += 1
            if name:
                self.by_kind[name] = self.by_kind.get(name, 0) + 1

    def fault(self, text):
        with self.lock:
            self.faults.append(text)
        print(f"serve_soak: {text}", file=sys.stderr, flush=True)

    def client(self, number):
        rng = random.Random(self.args.seed * 1000 + number)
        while not self.stop.is_set() and len(self.faults) < 20:
            name, data, fixed = self.kinds.draw(rng)
            try:
                if rng.random() < 0.4:
                    try:
                        leave(rng, self.server.port, data)
                    except (BrokenPipeError, ConnectionResetError):
                        pass
                    self.count("broken off")
                    continue
                status, body = self.ask(data)
                if status == 429:
                    self.count("queue full")
                elif fixed and (status, core(body)) != self.expected[name]:
                    self.fault(f"{name}: expected {self.expected[name]}, found {status} {body[:400]!r}")
                elif not fixed and status not in ALLOWED[name]:
                    self.fault(f"{name}: found {status} {body[:400]!r}")
                else:
                    self.count("whole", name)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if name == "a large body" and isinstance(error, OSError):
                    self.count("whole", name)  # the answer can be lost where the body is still on its way
                    continue
                if self.server.process.poll() is not None:
                    self.stop.set()
                self.fault(f"{name}: {type(error).__name__}: {error}")

    def run(self):
        self.learn()
        clients = [threading.Thread(target=self.client, args=(i,)) for i in range(self.args.clients)]
        begun = time.monotonic()
        memory = []
        for client in clients:
            client.start()
        while not self.stop.is_set() and time.monotonic() - begun < self.args.seconds and len(self.faults) < 20:
            time.sleep(min(10.0, self.args.seconds))
            try:
                memory.append((time.monotonic() - begun, self.server.memory()))
            except (OSError, TypeError):
                break
            if len(memory) % 6 == 0:
                print(f"{memory[-1][0]:.0f} s: {self.counts}, {memory[-1][1]:.0f} MiB, {len(self.faults)} faults", file=sys.stderr, flush=True)
        self.stop.set()
        for client in clients:
            client.join()
        return time.monotonic() - begun, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="weights_tools/refrag-nano")
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    # What AddressSanitizer keeps of freed memory grows to its limit, and is no leak of the server's.
    os.environ.setdefault("ASAN_OPTIONS", "quarantine_size_mb=64")
    with Server(args, "--parallel", "4", "--queue", "16", "--max-body", "4") as server:
        log = []

        def read_log():
            for line in server.process.stderr:
                log.append(line)
                sys.stderr.write(line)

        reader = threading.Thread(target=read_log)
        reader.start()
        run = Run(args, server)
        seconds, memory = run.run()
        if server.process.poll() is None:
            wait_until(lambda: server.metric("refrag_requests_pending") == 0)
            wait_until(lambda: server.metric("refrag_kv_pages_used") == 0)
            server.process.send_signal(signal.SIGTERM)
        code = server.process.wait()
        reader.join()
    quarter = max(1, len(memory) // 4)
    early = statistics.median(m for _, m in memory[quarter : 2 * quarter] or memory)
    late = statistics.median(m for _, m in memory[-quarter:])
    print("| what | figure |\n|---|---|")
    print(f"| time, clients | {seconds:.0f} s, {args.clients} |")
    print(f"| answered whole and as expected | {run.counts['whole']:,} |")
    print(f"| broken off by the client | {run.counts['broken off']:,} |")
    print(f"| refused, the queue full (429) | {run.counts['queue full']:,} |")
    print(f"| lost, cut short or other than expected | {len(run.faults)} |")
    print(f"| memory, median of the second and of the last quarter | {early:.0f}, {late:.0f} MiB |")
    print(f"| exit code after SIGTERM | {code} |")
    print("\nAnswered whole, by kind: " + ", ".join(f"{name} {n}" for name, n in sorted(run.by_kind.items())))
    if run.faults or code != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
