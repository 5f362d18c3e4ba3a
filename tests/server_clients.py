#!/usr/bin/env python3
"""Checks `refrag serve` with the clients that people use: OpenAI's (sync, async, streaming), Cohere's and curl.

    python tests/server_clients.py --refrag build/refrag --model weights_tools/refrag-nano [--only WORD]

It starts servers of its own on free ports. weights_tools/requirements-serve.txt has the clients; where one is not
installed its checks say SKIP. The model must have an encoder and a context of at least 256 positions.
Prints `ok NAME` or `FAIL NAME: why` for each check; exit code 1 where one failed.
"""
import argparse
import asyncio
import base64
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

try:
    import openai
except ImportError:
    openai = None
try:
    import cohere
    import httpx  # noqa: F401  (cohere's own, which it would import while streams of OpenAI's client are being closed)
except ImportError:
    cohere = None

TOWER = "The Dunmere Tower is a building in Perrow. The architect of the Dunmere Tower was Nerith Vosk."
RIVER = "The Urvik is a river in Selwin. The length of the Urvik is 734 km. The Urvik ends in the Tarn Sea."
CITY = "Corrash is a city in Brelk. Settlers founded Corrash in 1382. The workshops of Corrash produce violins."
QUESTION = [{"role": "user", "content": "How long is the Urvik?"}]
STORY = "The river Urvik begins in the hills, and"
KEYS = ["first-key-of-two", "second-key-of-two"]
LONG = "river and tower " * 4000

CHECKS = []  # (name, module or None, function)


class Failed(Exception):
    pass


class Skipped(Exception):
    pass


def check(name, *needs):
    """Registers a check. needs: "openai", "cohere", "curl"."""

    def register(function):
        CHECKS.append((name, needs, function))
        return function

    return register


def expect(condition, *what):
    if not condition:
        raise Failed(" ".join(str(part) for part in what))


def expect_equal(found, expected, what):
    expect(found == expected, f"{what}: expected {expected!r}, found {found!r}")


class Server:
    """A `refrag serve` on a free port, until the `with` ends."""

    def __init__(self, refrag, model, *options):
        command = [refrag, "serve", "-m", model, "--port", "0", "--alias", "tested", *options]
        self.lines = []
        self.command = command
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.url = None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.search(r"on (http://\S+)", line)
            if line.startswith("refrag: serving") and found:
                self.url = found[1]
                break
        if self.url is None:
            sys.exit(f"server_clients: the server does not start: {self.lines}")
        threading.Thread(target=self.read_on, daemon=True).start()

    def read_on(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def curl(self, path, body=None, *options):
        """(status, headers with small names, body as text). A body that is no string is sent as JSON."""
        command = ["curl", "-sS", "--max-time", "60", "-D", "-", *options]
        if body is not None:
            text = body if isinstance(body, str) else json.dumps(body)
            command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
        run = subprocess.run([*command, self.url + path], input=text if body is not None else "", capture_output=True,
                             text=True, check=False)
        expect_equal(run.returncode, 0, f"curl's exit code ({run.stderr.strip()})")
        rest = run.stdout
        while True:  # "100 Continue" comes before the head
            head, _, rest = rest.partition("\r\n\r\n" if "\r\n\r\n" in rest else "\n\n")
            status = int(head.split()[1])
            if status >= 200:
                break
        headers = dict(line.strip().split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        return status, {name.lower(): value for name, value in headers.items()}, rest

    def json(self, path, body=None, *options, status=200):
        found, headers, text = self.curl(path, body, *options)
        expect_equal(found, status, f"status of {path} ({text[:300]})")
        expect_equal(headers.get("content-type"), "application/json", f"content type of {path}")
        return json.loads(text)

    def events(self, path, body):
        """The data of a stream's events, [DONE] left out after it has been seen to be the last."""
        status, headers, text = self.curl(path, {**body, "stream": True}, "-N")
        expect_equal(status, 200, f"status ({text[:300]})")
        expect_equal(headers.get("content-type"), "text/event-stream", "content type")
        expect(text.endswith("\n\n"), "the stream does not end with an empty line:", text[-80:])
        data = []
        for event in text[:-2].split("\n\n"):
            lines = [line for line in event.split("\n") if line.startswith("data: ")]
            expect_equal(len(lines), 1, f"data lines of the event {event!r}")
            data.append(lines[0][len("data: ") :])
        expect_equal(data[-1], "[DONE]", "the last event")
        expect_equal(data.count("[DONE]"), 1, "[DONE] events")
        return [json.loads(one) for one in data[:-1]]

    def metric(self, name):
        _, _, text = self.curl("/metrics")
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def openai(self, key="unused", kind="OpenAI"):
        return getattr(openai, kind)(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def cohere(self, key="unused"):
        return cohere.ClientV2(api_key=key, base_url=self.url, timeout=60)


def expect_error(body, kind, code=None, param=None, says=()):
    """The one form of all errors."""
    expect(isinstance(body, dict) and "error" in body, "not an error object:", str(body)[:200])
    error = body["error"]
    expect_equal(set(error), {"message", "type", "param", "code"}, "keys of error")
    expect_equal(error["type"], kind, "error.type")
    expect_equal(error["code"], code, "error.code")
    expect_equal(error["param"], param, "error.param")
    expect_equal(body["message"], error["message"], "message beside error")
    for word in says:
        expect(str(word) in error["message"], f"{word!r} is not in the message {error['message']!r}")


def expect_refused(status, call, what=""):
    """What OpenAI's client raises for a status; its fields are those of the error object."""
    kinds = {400: openai.BadRequestError, 401: openai.AuthenticationError, 404: openai.NotFoundError,
             429: openai.RateLimitError}  # fmt: skip
    try:
        answer = call()
        if hasattr(answer, "__iter__"):
            list(answer)
    except kinds[status] as error:
        expect_equal(error.status_code, status, "status")
        return error
    raise Failed(f"no {kinds[status].__name__} was raised {what}".strip())


def sampled(client, **options):
    """A completion that draws its tokens."""
    return client.completions.create(
        model="tested", prompt=STORY, max_tokens=12, temperature=1.5, extra_body={"ignore_eos": True}, **options
    )


# ---- chat ----------------------------------------------------------------------------------------------------


@check("chat completion", "openai")
def chat_completion(server):
    answer = server.openai().chat.completions.create(model="tested", messages=QUESTION, max_tokens=8)
    expect_equal((answer.object, answer.model), ("chat.completion", "tested"), "object and model")
    expect(answer.id.startswith("chatcmpl-"), "id", answer.id)
    expect(abs(answer.created - time.time()) < 60, "created", answer.created)
    choice = answer.choices[0]
    expect_equal((choice.index, choice.message.role, choice.logprobs), (0, "assistant", None), "choice")
    expect(choice.message.content, "an empty answer")
    expect(choice.finish_reason in ("stop", "length"), "finish_reason", choice.finish_reason)
    expect_equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens, "total_tokens")


@check("chat: max_completion_tokens and max_tokens", "openai")
def chat_max_tokens(server):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.openai().chat.completions.create(
            model="tested", messages=QUESTION, extra_body={"ignore_eos": True}, **{name: 5}
        )
        expect_equal((answer.usage.completion_tokens, answer.choices[0].finish_reason), (5, "length"), name)


@check("streamed chat equals the whole answer", "openai")
def chat_streamed(server):
    request = {"model": "tested", "messages": QUESTION, "max_tokens": 48, "extra_body": {"ignore_eos": True}}
    client = server.openai()
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expect_equal(text, whole.choices[0].message.content, "text")
    expect(len(chunks) > 8, "chunks:", len(chunks))
    expect_equal(chunks[0].choices[0].delta.role, "assistant", "the first chunk's role")
    expect_equal({chunk.id for chunk in chunks}, {chunks[0].id}, "ids")
    expect_equal({chunk.object for chunk in chunks}, {"chat.completion.chunk"}, "objects")


@check("finish_reason is null until the end", "openai")
def chat_finish_reason(server):
    for extra, expected in (({"ignore_eos": True}, "length"), ({"documents": [RIVER]}, "stop")):
        chunks = list(server.openai().chat.completions.create(
            model="tested", messages=QUESTION, max_tokens=24, extra_body=extra, stream=True))  # fmt: skip
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        expect_equal(reasons, [None] * (len(chunks) - 1) + [expected], "finish reasons")


@check("usage in a stream: a last chunk without choices, and only where it is asked for", "openai")
def chat_stream_usage(server):
    request = {"model": "tested", "messages": QUESTION, "max_tokens": 6, "stream": True}
    client = server.openai()
    chunks = list(client.chat.completions.create(**request, stream_options={"include_usage": True}))
    expect_equal(chunks[-1].choices, [], "the last chunk's choices")
    expect(chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0, "the last chunk's usage")
    expect(all(chunk.choices and chunk.usage is None for chunk in chunks[:-1]), "usage or no choices before the last")
    for options in ({}, {"stream_options": {"include_usage": False}}):
        chunks = list(client.chat.completions.create(**request, **options))
        expect(all(chunk.choices and chunk.usage is None for chunk in chunks), "usage that was not asked for")
    options = {"include_usage": True, "continuous_usage_stats": True}  # vLLM's; guidellm sends it
    chunks = list(client.chat.completions.create(**request, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    expect_equal(counts, sorted(counts), "completion_tokens so far")
    expect_equal((chunks[-1].choices, counts[-1]), ([], counts[-2]), "the last chunk after usage so far")
    error = expect_refused(400, lambda: client.chat.completions.create(
        model="tested", messages=QUESTION, stream_options={"include_usage": True}))  # fmt: skip
    expect_equal(error.param, "stream_options", "param without stream: true")


@check("data: [DONE] ends a stream", "curl")
def done_ends(server):
    for path, body in (
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 4, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 4, "n": 3}),
        ("/v1/completions", {"prompt": STORY, "max_tokens": 4}),
        ("/v1/completions", {"prompt": STORY, "max_tokens": 0}),
        ("/v2/chat", {"messages": QUESTION, "max_tokens": 4}),
    ):
        expect(server.events(path, body), "no events from", path, body)


@check("chat: logprobs without top_logprobs", "openai")
def chat_logprobs(server):
    answer = server.openai().chat.completions.create(
        model="tested", messages=QUESTION, max_tokens=6, logprobs=True, extra_body={"ignore_eos": True}
    )
    tokens = answer.choices[0].logprobs.content
    expect_equal(len(tokens), 6, "tokens")
    expect(all(token.logprob <= 0 and token.top_logprobs == [] for token in tokens), "logprob or top_logprobs")
    spelt = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    expect_equal(spelt.strip(), answer.choices[0].message.content.strip(), "the tokens' bytes")


@check("chat: top_logprobs", "openai")
def chat_top_logprobs(server):
    request = {"model": "tested", "messages": QUESTION, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    client = server.openai()
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    for token in content:
        tops = [top.logprob for top in token.top_logprobs]
        expect_equal(len(tops), 3, "top_logprobs")
        expect_equal(tops, sorted(tops, reverse=True), "the order of top_logprobs")
        expect_equal(token.top_logprobs[0].token, token.token, "the greedy token against the most likely one")
    streamed = [
        token
        for chunk in client.chat.completions.create(**request, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    expect_equal([t.token for t in streamed], [t.token for t in content], "streamed tokens")
    error = expect_refused(400, lambda: client.chat.completions.create(
        model="tested", messages=QUESTION, top_logprobs=2))  # fmt: skip
    expect_equal(error.param, "top_logprobs", "param without logprobs: true")


@check("n = 2 with temperature and seed is reproducible", "openai")
def choices_of_a_seed(server):
    client = server.openai()
    first, again, other = (
        [choice.text for choice in sampled(client, n=2, seed=seed).choices] for seed in (7, 7, 8)
    )
    expect_equal(again, first, "the same seed")
    expect(first[0] != first[1], "both choices are", first[0])
    expect(other != first, "another seed gives the same")
    unseeded = [sampled(client).choices[0].text for _ in range(4)]
    expect(len(set(unseeded)) > 1, "without a seed all are", unseeded[0])
    events = server.events("/v1/completions", {"prompt": STORY, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 2,
                                               "ignore_eos": True})  # fmt: skip
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    expect_equal(texts, first, "streamed")


@check("stop strings do not leak and swallow nothing", "openai")
def stop_strings(server):
    client = server.openai()
    request = {"model": "tested", "prompt": STORY, "max_tokens": 48, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**request).choices[0].text
    cuts = [(at, length) for at in range(3, len(whole) - 4, 7) for length in (1, 4)]
    for at, length in cuts:
        stop = whole[at : at + length]
        before = whole[: whole.index(stop)]
        options = {**request, "stop": ["never to be seen", stop]}
        choice = client.completions.create(**options).choices[0]
        expect_equal((choice.text, choice.finish_reason), (before, "stop"), f"stop {stop!r}")
        chunks = list(client.completions.create(**options, stream=True))
        expect_equal("".join(chunk.choices[0].text for chunk in chunks), before, f"streamed, stop {stop!r}")
        expect_equal(chunks[-1].choices[0].finish_reason, "stop", f"streamed, stop {stop!r}")
    # What only begins like a stop string is given out at the end.
    tail = whole[-3:] + " and not to the end"
    choice = client.completions.create(**request, stop=tail).choices[0]
    expect_equal((choice.text, choice.finish_reason), (whole, "length"), "a stop string that is not completed")
    chat = client.chat.completions.create(model="tested", messages=QUESTION, max_tokens=24, stop="e",
                                          extra_body={"ignore_eos": True})  # fmt: skip
    expect("e" not in chat.choices[0].message.content, "chat leaks the stop string:", chat.choices[0].message.content)


# ---- completions ---------------------------------------------------------------------------------------------


@check("completions: echo, logprobs and max_tokens 0 or 1", "openai")
def completions_echo(server):
    prompt = "The tower stands, they say, near the old river."
    client = server.openai()
    for n_new in (0, 1):
        answer = client.completions.create(model="tested", prompt=prompt, echo=True, logprobs=2, max_tokens=n_new)
        choice = answer.choices[0]
        lists = choice.logprobs
        expect(choice.text.startswith(prompt), "echo", choice.text)
        lengths = {len(part) for part in (lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset)}
        expect_equal(len(lengths), 1, f"lengths of the four lists ({lengths})")
        expect_equal("".join(lists.tokens), choice.text, "the tokens' text")
        expect_equal(answer.usage.completion_tokens, n_new, "completion_tokens")
        for token, offset, logprob, top in zip(lists.tokens, lists.text_offset, lists.token_logprobs,
                                               lists.top_logprobs):  # fmt: skip
            expect_equal(choice.text[offset : offset + len(token)], token, f"text at {offset}")
            if logprob is None:  # nothing stands before it
                expect_equal(offset, 0, "offset of a token without log-probability")
                continue
            expect(logprob <= 0 and max(top.values()) >= logprob - 1e-4, "top_logprobs of", token)
            expect(token in top, f"{token!r} is not in its own top_logprobs")
        if n_new == 1:
            best = max(lists.top_logprobs[-1].values())
            expect(abs(best - lists.token_logprobs[-1]) < 1e-4, "the greedy token is not the most likely one")


@check("completions: token-id prompts, as lm-eval sends them", "openai", "curl")
def completions_ids(server):
    client = server.openai()
    tokens = server.json("/tokenize", {"prompt": STORY})["tokens"]
    of_text = client.completions.create(model="tested", prompt=STORY, max_tokens=8).choices[0].text
    of_ids = client.completions.create(model="tested", prompt=tokens, max_tokens=8)
    expect_equal(of_ids.choices[0].text, of_text, "ids of /tokenize against the text")
    expect_equal(of_ids.usage.prompt_tokens, len(tokens), "prompt_tokens")
    scored = client.completions.create(model="tested", prompt=[tokens, tokens[:5]], max_tokens=1, logprobs=1, echo=True,
                                       seed=1234, temperature=0)  # fmt: skip
    for choice, n in zip(scored.choices, (len(tokens), 5)):
        expect_equal(len(choice.logprobs.token_logprobs), n + 1, "token_logprobs")
        expect_equal(choice.logprobs.token_logprobs[0], None, "the first id's log-probability")
        expect(all(value <= 0 for value in choice.logprobs.token_logprobs[1:]), "a log-probability above 0")
    expect_equal(scored.choices[1].logprobs.token_logprobs[1:5], scored.choices[0].logprobs.token_logprobs[1:5],
                 "log-probabilities of the same beginning")  # fmt: skip


@check("completions: several prompts, each n times", "openai")
def completions_several(server):
    prompts = ["The tower", "A river in the north", "Once"]
    client = server.openai()
    alone = [client.completions.create(model="tested", prompt=one, max_tokens=6).choices[0].text for one in prompts]
    together = client.completions.create(model="tested", prompt=prompts, max_tokens=6, n=2)
    expect_equal([choice.index for choice in together.choices], list(range(6)), "indices")
    expect_equal([choice.text for choice in together.choices], [text for text in alone for _ in range(2)], "texts")


# ---- documents -----------------------------------------------------------------------------------------------


@check("documents in their three forms", "openai")
def documents(server):
    forms = [CITY, {"id": "river", "title": "Urvik", "text": RIVER}, {"id": "tower", "data": {"title": "Tower", "text": TOWER}}]
    answer = server.openai().chat.completions.create(
        model="tested", messages=QUESTION, max_tokens=16, extra_body={"documents": forms, "policy": "all"}
    )
    expect("734" in answer.choices[0].message.content, "the answer is", answer.choices[0].message.content)
    report = answer.model_extra["refrag"]
    expect_equal([one["id"] for one in report["documents"]], ["doc:0", "river", "tower"], "ids")
    expect_equal({one["read"] for one in report["documents"]}, {"expanded"}, "read with policy all")
    citation = answer.choices[0].message.model_extra["citations"][0]
    expect_equal(citation["sources"][0]["id"], "river", "the cited document")
    text = answer.choices[0].message.content
    expect_equal(text[citation["start"] : citation["end"]], citation["text"], "the cited text")
    for _ in range(2):
        compressed = server.openai().chat.completions.create(
            model="tested", messages=QUESTION, max_tokens=4, extra_body={"documents": forms, "policy": "none"}
        ).model_extra["refrag"]
    expect_equal({one["read"] for one in compressed["documents"]}, {"compressed"}, "read with policy none")
    expect(compressed["positions"] < compressed["plain_tokens"], "positions", compressed)
    expect_equal(compressed["cached"], compressed["chunks"], "chunks that were encoded before")


@check("passage_ids of passages that were put", "openai", "curl")
def passage_ids(server):
    for status in (201, 200):
        put = server.json("/v1/passages/a%20river", {"title": "Urvik", "text": RIVER}, "-X", "PUT", status=status)
    expect_equal((put["id"], put["object"], put["encoded"]), ("a river", "passage", True), "the passage")
    request = {"model": "tested", "messages": QUESTION, "max_tokens": 16}
    client = server.openai()
    by_id = client.chat.completions.create(**request, extra_body={"passage_ids": ["a river"], "policy": "all"})
    inline = client.chat.completions.create(
        **request, extra_body={"documents": [{"id": "a river", "title": "Urvik", "text": RIVER}], "policy": "all"}
    )
    expect_equal(by_id.choices[0].message.content, inline.choices[0].message.content, "by id against inline")
    report = by_id.model_extra["refrag"]
    expect_equal((report["documents"][0]["id"], report["cached"]), ("a river", report["chunks"]), "id and cached chunks")
    expect_equal([one["id"] for one in server.json("/v1/passages")["data"]], ["a river"], "the list")
    expect_equal(server.json("/v1/passages/a%20river")["text"], RIVER, "GET")
    expect_equal(server.json("/v1/passages/a%20river", None, "-X", "DELETE")["deleted"], True, "DELETE")
    error = expect_refused(404, lambda: client.chat.completions.create(**request, extra_body={"passage_ids": ["a river"]}))
    expect_equal((error.code, error.param), ("passage_not_found", "passage_ids"), "after DELETE")
    expect_error(server.json("/v1/passages/a%20river", status=404), "invalid_request_error", "passage_not_found", "id")


@check("store: passages that the server finds in its store", "openai")
def store(server):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "notes.db")
        rows = [{"id": "city", "text": CITY}, {"id": "river", "text": RIVER}, {"id": "tower", "text": TOWER}]
        with open(os.path.join(folder, "notes.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        index = [server.command[0], "index", path, file.name, "-m", server.command[3]]
        run = subprocess.run(index, capture_output=True, text=True, check=False)
        if "built without" in run.stderr:
            raise Skipped("a build without stores")
        expect_equal(run.returncode, 0, f"exit code of refrag index ({run.stderr})")
        with server.another("--store", path) as stored:
            answer = stored.openai().chat.completions.create(
                model="tested", messages=QUESTION, max_tokens=16, extra_body={"store": {"top": 1}, "policy": "all"}
            )
            expect_equal([one["id"] for one in answer.model_extra["refrag"]["documents"]], ["river"], "ids")
            expect("734" in answer.choices[0].message.content, "the answer is", answer.choices[0].message.content)
    error = expect_refused(400, lambda: server.openai().chat.completions.create(
        model="tested", messages=QUESTION, extra_body={"store": {"top": 1}}))  # fmt: skip
    expect_equal(error.param, "store", "param without --store")


# ---- embeddings ----------------------------------------------------------------------------------------------


def length(vector):
    return math.sqrt(sum(value * value for value in vector))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (length(a) * length(b))


@check("embeddings: base64 (the client's default) and float are the same", "openai", "curl")
def embeddings(server):
    client = server.openai()
    texts = [RIVER, TOWER]
    default = client.embeddings.create(model="tested", input=texts)
    floats = client.embeddings.create(model="tested", input=texts, encoding_format="float")
    expect_equal([one.index for one in default.data], [0, 1], "indices")
    for a, b in zip(default.data, floats.data):
        expect(abs(length(a.embedding) - 1) < 1e-3, "length", length(a.embedding))
        expect(max(abs(x - y) for x, y in zip(a.embedding, b.embedding)) < 1e-5, "base64 differs from float")
    raw = server.json("/v1/embeddings", {"input": RIVER, "encoding_format": "base64"})["data"][0]["embedding"]
    values = struct.unpack(f"<{len(floats.data[0].embedding)}f", base64.b64decode(raw))
    expect(cosine(values, floats.data[0].embedding) > 0.9999, "the raw base64")
    expect_equal(floats.usage.total_tokens, floats.usage.prompt_tokens, "total_tokens")
    error = expect_refused(400, lambda: client.embeddings.create(model="tested", input=RIVER, dimensions=3))
    expect_equal(error.param, "dimensions", "param")


@check("embeddings: pooling none gives a vector for each chunk", "openai")
def embeddings_of_chunks(server):
    client = server.openai()
    texts = [RIVER, "violins"]
    chunks = client.embeddings.create(model="tested", input=texts, encoding_format="float", extra_body={"pooling": "none"})
    pooled = client.embeddings.create(model="tested", input=texts, encoding_format="float")
    expect_equal([one.index for one in chunks.data], list(range(len(chunks.data))), "indices")
    inputs = [one.model_extra["input"] for one in chunks.data]
    expect(inputs == sorted(inputs) and set(inputs) == {0, 1} and inputs.count(0) > 1, "inputs", inputs)
    end = 0
    for one in chunks.data:
        begin = one.model_extra["begin"]
        expect(begin == (end if one.model_extra["input"] == 0 else 0), "a gap before", begin)
        end = one.model_extra["end"]
    expect(cosine(chunks.data[-1].embedding, pooled.data[1].embedding) > 0.9999, "one chunk against its pooled vector")


# ---- models, refusals ----------------------------------------------------------------------------------------


@check("models: list, retrieve, unknown", "openai")
def models(server):
    client = server.openai()
    expect_equal([one.id for one in client.models.list()], ["tested"], "the list")
    expect_equal(client.models.retrieve("tested").id, "tested", "the model")
    error = expect_refused(404, lambda: client.models.retrieve("other"))
    expect_equal((error.code, error.param), ("model_not_found", "model"), "retrieve")
    for call in (
        lambda: client.chat.completions.create(model="other", messages=QUESTION),
        lambda: client.chat.completions.create(model="other", messages=QUESTION, stream=True),
        lambda: client.completions.create(model="other", prompt=STORY),
        lambda: client.embeddings.create(model="other", input="a"),
    ):
        error = expect_refused(404, call)
        expect_equal((error.code, error.param, error.type), ("model_not_found", "model", "invalid_request_error"), "code")


@check("a prompt that is too long is 400 with both numbers, streaming or not", "openai", "curl")
def too_long(server):
    client = server.openai()
    context = client.models.retrieve("tested").model_extra["max_model_len"]
    n_tokens = server.json("/tokenize", {"prompt": LONG})["count"]
    calls = {
        "chat": lambda stream: client.chat.completions.create(
            model="tested", messages=[{"role": "user", "content": LONG}], stream=stream),
        "completions": lambda stream: client.completions.create(model="tested", prompt=LONG, stream=stream),
        "documents": lambda stream: client.chat.completions.create(
            model="tested", messages=QUESTION, stream=stream, extra_body={"documents": [LONG], "policy": "all"}),
    }  # fmt: skip
    for name, call in calls.items():
        for stream in (False, True):
            error = expect_refused(400, lambda: call(stream))
            expect_equal((error.code, error.type), ("context_length_exceeded", "invalid_request_error"), name)
            numbers = [int(number) for number in re.findall(r"\d+", error.message)]
            expect(context in numbers, f"{name}: {context} is not in", error.message)
            expect(any(n_tokens - 64 <= number <= n_tokens + 64 for number in numbers), f"{name}: about {n_tokens} is not in",
                   error.message)  # fmt: skip


@check("an unknown field is 400 by name, a harmless one is let pass", "openai")
def unknown_field(server):
    client = server.openai()
    request = {"model": "tested", "messages": QUESTION, "max_tokens": 2}
    for field, value in (("beam_width", 4), ("logit_bias", {"5": 1}), ("tools", [{"type": "function"}]),
                         ("response_format", {"type": "json_object"}), ("modalities", ["audio"]),
                         ("functions", [{"name": "f"}]), ("tool_choice", "required")):  # fmt: skip
        error = expect_refused(400, lambda: client.chat.completions.create(**request, extra_body={field: value}))
        expect_equal(error.param, field, "param")
        expect(field in error.message, f"{field} is not in", error.message)
    client.chat.completions.create(**request, user="someone", extra_body={"metadata": {"a": "b"}, "beam_width": None})
    # What clients send along without asking for anything.
    request["messages"] = [QUESTION[0], {"role": "assistant", "content": "734 km", "tool_calls": []}, QUESTION[0]]
    client.chat.completions.create(**request, extra_body={"tools": [], "logit_bias": {}, "tool_choice": "auto", "store": False,
                                                          "response_format": {"type": "text"}})  # fmt: skip


@check("fields out of range are 400 by name", "openai")
def out_of_range(server):
    client = server.openai()
    for field, value in (("temperature", -1), ("top_p", 2), ("n", 0), ("n", 129), ("max_tokens", -5), ("max_tokens", "many"),
                         ("presence_penalty", 3), ("seed", 0.5), ("top_logprobs", 21), ("stop", [1]), ("timeout", 0),
                         ("expand_fraction", 1.5), ("policy", "best"), ("stream", "yes"), ("documents", "a"),
                         ("documents", [""]), ("passage_ids", [3]), ("messages", [])):  # fmt: skip
        body = {"messages": QUESTION, "logprobs": True, "max_tokens": 2, field: value}
        error = expect_refused(400, lambda: client.post("/chat/completions", body=body, cast_to=object), f"{field}: {value!r}")
        expect_equal(error.param, field, f"param of {field} = {value!r} ({error.message})")


@check("API keys: missing, wrong, right", "openai", "curl")
def api_keys(server):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "keys")
        with open(path, "w", encoding="utf-8") as file:
            file.write("# those who may\n" + "\n".join(KEYS) + "\n")
        with server.another("--api-key-file", path, "--cors", "https://page.example") as keyed:
            for key in ("wrong", KEYS[0][:-1], KEYS[0] + "x"):
                error = expect_refused(401, lambda: keyed.openai(key).models.list())
                expect_equal((error.code, error.type), ("invalid_api_key", "authentication_error"), "code")
            for key in KEYS:
                expect_equal([one.id for one in keyed.openai(key).models.list()], ["tested"], "the list")
            for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/chat/completions", {"messages": QUESTION}),
                               ("/v2/chat", "not JSON"), ("/tokenize", {"content": "a"})):  # fmt: skip
                status, headers, text = keyed.curl(path, body)
                expect_equal((status, headers.get("www-authenticate")), (401, "Bearer"), path)
                expect_error(json.loads(text), "authentication_error", "invalid_api_key")
            for path in ("/health", "/ready", "/openapi.json"):
                expect_equal(keyed.curl(path)[0], 200, path)
            preflight = ("-X", "OPTIONS", "-H", "Access-Control-Request-Method: POST", "-H")
            status, headers, _ = keyed.curl("/v1/chat/completions", None, *preflight, "Origin: https://page.example")
            expect_equal(status, 204, "OPTIONS without a key")
            expect_equal(headers.get("access-control-allow-origin"), "https://page.example", "the origin")
            expect("authorization" in headers.get("access-control-allow-headers", "").lower(), "allowed headers", headers)
            expect("access-control-allow-credentials" not in headers, "credentials are allowed")
            _, headers, _ = keyed.curl("/v1/chat/completions", None, *preflight, "Origin: https://other.example")
            expect("access-control-allow-origin" not in headers, "another origin is allowed")


@check("errors have one form everywhere", "curl")
def errors(server):
    post = "/v1/chat/completions"
    expect_error(server.json("/v1/nothing", status=404), "invalid_request_error", "not_found")
    status, headers, text = server.curl("/v1/models", None, "-X", "DELETE")
    expect_equal((status, headers.get("allow")), (405, "GET"), "DELETE /v1/models")
    expect_error(json.loads(text), "invalid_request_error", "method_not_allowed")
    status, headers, _ = server.curl("/v1/passages/a", None, "-X", "OPTIONS")
    expect_equal((status, headers.get("allow")), (204, "PUT, GET, DELETE, OPTIONS"), "OPTIONS /v1/passages/a")
    expect_error(server.json("/v1/nothing", None, "-X", "OPTIONS", status=404), "invalid_request_error", "not_found")
    for path in ("/v1/passages/a%00b", "/v1/passages/%FF", "/health%00"):
        expect_error(server.json(path, {"text": "a"}, "-X", "PUT", status=400), "invalid_request_error")
    status, headers, text = server.curl("/v1/passages/a", None, "-X", "PATCH")
    expect_equal((status, headers.get("allow")), (405, "PUT, GET, DELETE"), "PATCH /v1/passages/a")
    expect_error(json.loads(text), "invalid_request_error", "method_not_allowed")
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, text = server.curl(post, None, "-H", f"Content-Type: {kind}", "-d", "{}")
        expect_equal(status, 415, kind)
        expect_error(json.loads(text), "invalid_request_error", says=[kind])
    for body in ("", "{", "[]", "null", '{"messages": [}', '{"a": 1, "a": 2}', "\ufffd", '{"messages": "\\ud800"}'):
        for path in (post, "/v1/completions", "/v1/embeddings", "/v2/chat", "/tokenize", "/detokenize"):
            found, _, text = server.curl(path, body)
            expect_equal(found, 400, f"{path} with {body!r}")
            expect_equal(json.loads(text)["error"]["type"], "invalid_request_error", "type")
    expect_error(server.json(post, {}, status=400), "invalid_request_error", param="messages")
    expect_error(server.json("/v1/completions", {}, status=400), "invalid_request_error", param="prompt")
    expect_error(server.json("/v1/embeddings", {}, status=400), "invalid_request_error", param="input")
    expect_error(server.json("/detokenize", {}, status=400), "invalid_request_error", param="tokens")
    expect_error(server.json("/v1/passages/a", {}, "-X", "PUT", status=400), "invalid_request_error", param="text")
    expect_error(server.json("/detokenize", {"tokens": [1 << 40]}, status=400), "invalid_request_error", param="tokens")


@check("a body that is too large is 413", "curl")
def too_large(server):
    with server.another("--max-body", "1") as small:
        body = {"messages": [{"role": "user", "content": "a" * (3 << 19)}]}
        for path in ("/v1/chat/completions", "/v1/nothing"):
            status, _, text = small.curl(path, body)
            expect_equal(status, 413, path)
            expect_error(json.loads(text), "invalid_request_error", says=[1 << 20])
        fits = {"messages": [{"role": "user", "content": "a"}], "user": "a" * (1 << 19), "max_tokens": 2}
        small.json("/v1/chat/completions", fits)


@check("a full queue is 429 with Retry-After", "openai", "curl")
def full_queue(server):
    with server.another("--parallel", "1", "--queue", "1") as small:
        client = small.openai()
        request = {"model": "tested", "messages": QUESTION, "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
        with client.chat.completions.create(**request, stream=True) as running:
            next(iter(running))
            waiting = threading.Thread(target=lambda: client.chat.completions.create(**{**request, "max_tokens": 1}))
            waiting.start()
            time.sleep(0.1)
            status, headers, text = small.curl("/v1/chat/completions", {"messages": QUESTION})
            expect_equal(status, 429, "status")
            expect(int(headers.get("retry-after", 0)) > 0, "Retry-After", headers)
            expect_error(json.loads(text), "rate_limit_error", "queue_full")
            expect_equal(small.curl("/health")[0], 200, "/health beside it")
        waiting.join(timeout=30)
        expect(not waiting.is_alive(), "the request that waited was not answered")


@check("a request whose time is over is 504", "curl")
def deadline(server):
    with server.another("--parallel", "1") as small:
        busy = threading.Thread(target=lambda: small.curl(
            "/v1/completions", {"prompt": STORY, "max_tokens": 1000, "ignore_eos": True}))  # fmt: skip
        busy.start()
        time.sleep(0.1)
        body = {"messages": QUESTION, "timeout": 0.05}
        for stream in (False, True):
            answer = small.json("/v1/chat/completions", {**body, "stream": stream}, status=504)
            expect_error(answer, "timeout_error", "deadline_exceeded")
        busy.join()


# ---- Cohere --------------------------------------------------------------------------------------------------

COHERE_DOCUMENTS = [
    {"id": "city", "data": {"title": "Corrash", "text": CITY}},
    {"id": "river", "data": {"title": "Urvik", "text": RIVER}},
]


@check("cohere: chat with documents and citations", "cohere")
def cohere_chat(server):
    answer = server.cohere().chat(model="tested", messages=QUESTION, documents=COHERE_DOCUMENTS, max_tokens=16)
    text = answer.message.content[0].text
    expect("734" in text, "the answer is", text)
    expect_equal((answer.message.role, answer.finish_reason), ("assistant", "COMPLETE"), "role and finish_reason")
    citation = answer.message.citations[0]
    expect_equal(text[citation.start : citation.end], citation.text, "the cited text")
    expect_equal((citation.sources[0].type, citation.sources[0].id), ("document", "river"), "the source")
    expect_equal(citation.sources[0].document["title"], "Urvik", "the source's document")
    expect(answer.usage.tokens.output_tokens > 0 and answer.usage.billed_units.input_tokens > 0, "usage", answer.usage)
    plain = server.cohere().chat(model="tested", messages=QUESTION, max_tokens=4, p=0.9, k=5, temperature=0.5, seed=3,
                                 stop_sequences=["zzz"], logprobs=True)  # fmt: skip
    expect(plain.message.content[0].text and plain.logprobs, "text and logprobs", plain)
    logprobs = [value for item in plain.logprobs for value in item.logprobs]
    expect(logprobs and all(value <= 0 for value in logprobs), "log-probabilities", plain.logprobs)
    silent = server.cohere().chat(model="tested", messages=QUESTION, documents=COHERE_DOCUMENTS, max_tokens=16,
                                  citation_options={"mode": "OFF"}, thinking={"type": "disabled"})  # fmt: skip
    expect_equal((silent.message.content[0].text, silent.message.citations), (text, None), "without citations")
    text_form = server.cohere().chat(model="tested", messages=QUESTION, documents=[RIVER], max_tokens=8)
    expect("734" in text_form.message.content[0].text, "a document that is a string:", text_form.message.content[0].text)


@check("cohere: the order of a stream's events", "cohere")
def cohere_stream(server):
    client = server.cohere()
    request = {"model": "tested", "messages": QUESTION, "documents": COHERE_DOCUMENTS, "max_tokens": 16}
    whole = client.chat(**request)
    events = list(client.chat_stream(**request))
    kinds = [event.type for event in events]
    order = " ".join(kinds) + " "
    pattern = (r"message-start content-start (content-delta )+content-end (citation-start citation-end )+message-end ")
    expect(re.fullmatch(pattern, order), "the order is", order)
    text = "".join(event.delta.message.content.text for event in events if event.type == "content-delta")
    expect_equal(text, whole.message.content[0].text, "text")
    starts = [event for event in events if event.type == "citation-start"]
    expect_equal([event.index for event in starts], list(range(len(starts))), "indices of citations")
    expect_equal([event.delta.message.citations.sources[0].id for event in starts],
                 [citation.sources[0].id for citation in whole.message.citations], "sources")  # fmt: skip
    expect_equal(events[-1].delta.finish_reason, whole.finish_reason, "finish_reason")
    expect(events[-1].delta.usage.tokens.output_tokens > 0, "usage")
    expect(events[0].id, "an id")
    whole = client.chat(**request, logprobs=True)
    deltas = [event for event in client.chat_stream(**request, logprobs=True) if event.type == "content-delta"]
    expect_equal([value for event in deltas if event.logprobs for value in event.logprobs.logprobs],
                 [value for item in whole.logprobs for value in item.logprobs], "log-probabilities")  # fmt: skip


@check("cohere: refusals", "cohere")
def cohere_refusals(server):
    client = server.cohere()
    for kind, says, call in (
        (cohere.NotFoundError, "other", lambda: client.chat(model="other", messages=QUESTION)),
        (cohere.BadRequestError, "max_tokens", lambda: client.chat(model="tested", messages=QUESTION, max_tokens=0)),
        (cohere.BadRequestError, "tools", lambda: client.chat(model="tested", messages=QUESTION, tools=[
            {"type": "function", "function": {"name": "f", "parameters": {}}}])),
    ):  # fmt: skip
        try:
            call()
        except kind as error:
            expect(says in error.body["message"], f"{says} is not in", error.body)
        else:
            raise Failed(f"no {kind.__name__} was raised")


# ---- many at a time, and clients that leave ------------------------------------------------------------------


@check("async: 8 requests at a time, each with its own answer", "openai")
def concurrent(server):
    names = ["Ash", "Birch", "Cedar", "Dale", "Elm", "Fir", "Gorse", "Heath"]
    request = [
        {"model": "tested", "prompt": f"{STORY} {name}", "max_tokens": 24, "extra_body": {"ignore_eos": True}} for name in names
    ]
    alone = [server.openai().completions.create(**one).choices[0].text for one in request]

    async def together():
        async with server.openai(kind="AsyncOpenAI") as client:

            async def streamed(one):
                stream = await client.completions.create(**one, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(one):
                return (await client.completions.create(**one)).choices[0].text

            return await asyncio.gather(*(streamed(one) if i % 2 else whole(one) for i, one in enumerate(request)))

    expect_equal(asyncio.run(together()), alone, "texts")


@check("a client that closes its stream early is noticed", "openai", "curl")
def leaves(server):
    client = server.openai()
    left = server.metric("refrag_clients_left_total")
    request = {"model": "tested", "prompt": [STORY] * 4, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**request, stream=True)
    for _, _ in zip(range(8), stream):
        pass
    time.sleep(0.1)  # the gauge is written every 50 ms
    expect(server.metric("refrag_requests_running") > 0, "nothing runs")
    stream.close()
    closed = time.monotonic()
    while server.metric("refrag_requests_running") > 0:
        expect(time.monotonic() - closed < 0.5, "it still runs after 0.5 s")
        time.sleep(0.01)
    expect_equal(server.metric("refrag_clients_left_total"), left + 1, "clients that left")
    expect_equal(server.metric("refrag_requests_pending"), 0, "pending")
    # And one that waits for the whole answer.
    run = subprocess.run(["curl", "-s", "--max-time", "0.3", "-H", "Content-Type: application/json", "-d",
                          json.dumps({"prompt": [STORY] * 4, "max_tokens": 1500, "ignore_eos": True}),
                          server.url + "/v1/completions"], capture_output=True, check=False)  # fmt: skip
    expect_equal(run.returncode, 28, "curl's exit code (28: its time is over)")
    closed = time.monotonic()
    while server.metric("refrag_requests_pending") > 0:
        expect(time.monotonic() - closed < 0.5, "the whole answer is still worked on after 0.5 s")
        time.sleep(0.01)


@check("SIGTERM: what is under way ends, then the server", "openai")
def drains(server):
    with server.another() as leaving:
        request = {"model": "tested", "prompt": STORY, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        client = leaving.openai()
        whole = client.completions.create(**request).choices[0].text
        stream = iter(client.completions.create(**request, stream=True))
        text = next(stream).choices[0].text
        leaving.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        expect_equal(text + "".join(chunk.choices[0].text for chunk in chunks), whole, "the stream's text")
        expect_equal(chunks[-1].choices[0].finish_reason, "length", "finish_reason")
        expect_equal(leaving.process.wait(timeout=10), 0, "exit code")


# ---- tokens, state -------------------------------------------------------------------------------------------


@check("tokenize and detokenize", "curl")
def tokens_there_and_back(server):
    for text in (RIVER, "Grüße, 東京 🗼!", " a  b\n\n\tc ", ""):
        tokens = server.json("/tokenize", {"content": text})
        expect_equal(tokens["count"], len(tokens["tokens"]), "count")
        expect_equal(server.json("/detokenize", {"tokens": tokens["tokens"]})["content"], text, "there and back")
    both = server.json("/tokenize", {"prompt": "a", "content": "b"}, status=400)
    expect_error(both, "invalid_request_error", param="content")


@check("health, ready, metrics, openapi", "curl")
def state(server):
    expect_equal(server.json("/health"), {"status": "ok"}, "/health")
    expect_equal(server.json("/ready"), {"status": "ready"}, "/ready")
    status, headers, text = server.curl("/metrics")
    expect_equal((status, headers["content-type"].split(";")[0]), (200, "text/plain"), "/metrics")
    for line in text.splitlines():
        expect(re.fullmatch(r"# (HELP|TYPE) \S+ .+|[a-z_]+(\{[^}]*\})? -?[0-9.e+-]+", line), "a line of /metrics:", line)
    described = server.json("/openapi.json")
    expect_equal(described["openapi"], "3.1.0", "openapi")
    expect("@" not in described["info"]["version"], "version", described["info"]["version"])
    for path in described["paths"]:
        status, _, text = server.curl(path.replace("{id}", "a").replace("{model}", "tested"), None, "-X", "PATCH")
        expect_equal(status, 405, f"PATCH {path}, which /openapi.json has")


def missing(needs):
    modules = {"openai": openai, "cohere": cohere, "curl": shutil.which("curl")}
    return [name for name in needs if modules[name] is None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--model", default="weights_tools/refrag-nano")
    parser.add_argument("--only", default="", help="checks with this in their names")
    parser.add_argument("--trace", action="store_true", help="where a check failed")
    arguments = parser.parse_args()
    passed, failed, skipped = 0, 0, 0
    with Server(arguments.refrag, arguments.model) as server:
        server.another = lambda *options: Server(arguments.refrag, arguments.model, *options)
        for name, needs, function in CHECKS:
            if arguments.only not in name:
                continue
            if lacking := missing(needs):
                print(f"SKIP {name}: {', '.join(lacking)} is not installed", flush=True)
                skipped += 1
                continue
            try:
                function(server)
            except Skipped as why:
                print(f"SKIP {name}: {why}", flush=True)
                skipped += 1
            except Exception as error:  # pylint: disable=broad-except
                failed += 1
                why = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                print(f"FAIL {name}: {why}", flush=True)
                if arguments.trace:
                    traceback.print_exc()
            else:
                passed += 1
                print(f"ok {name}", flush=True)
        if server.process.poll() is not None:
            failed += 1
            print(f"FAIL the server ended with exit code {server.process.returncode}: {server.lines[-3:]}")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
