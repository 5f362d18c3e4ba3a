#!/usr/bin/env python3
"""`--decoder-url` against a real vLLM: the small model and, where it is set up (make model), the default one.

    VLLM_ENVIRONMENT/bin/python tests/vllm_decoder.py [--refrag build/refrag] [--small weights_tools/refrag-nano] [--default build/refrag-smol]

Starts vLLM on each model's decoder (weights_tools/merge_decoder.py makes it of ours) in fp32, so that rounding decides no answer; asks the demo's questions
there and here, greedily; streams; kills it in the middle of an answer; starts it once without --enable-prompt-embeds. Prints a line for each check and
"N passed, N failed" at the end. Takes some minutes. src/remote/README.md says how vLLM is installed.
"""
import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600
NEAR_TIE = 0.1  # our rounding to bf16 can turn these
CONTEXT = 2048  # of the small model
passed, failed = [], []


def check(name, ok, found=""):
    (passed if ok else failed).append(name)
    print(f"{'ok  ' if ok else 'FAIL'} {name}{'' if ok else f': found {found}'}", flush=True)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Vllm:
    def __init__(self, decoder, context, *options):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(decoder), "--served-model-name", "remote", "--host", "127.0.0.1",
                   "--port", str(self.port), "--dtype", "float32", "--max-model-len", str(context), "--max-num-seqs", "4", "--enforce-eager", *options]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        begun = time.monotonic()
        while time.monotonic() - begun < START_SECONDS:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.log.seek(0)
        raise SystemExit(f"vllm_decoder: vLLM did not start:\n{self.log.read()[-3000:]}")

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def run(args, model, passages, questions, *options):
    command = [args.refrag, "run", "-m", model, "--passages", passages, "-n", "24", "--stop", "\n", "--json", "--logprobs", "2", *options]
    for question in questions:
        command += ["-q", question]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def margin(here, there):
    """How far apart here the two most likely tokens are where two answers part, in nats."""
    for a, b in zip(here["logprobs"], there["logprobs"]):
        if a["id"] != b["id"]:
            return a["top"][0]["logprob"] - a["top"][1]["logprob"]
    return 1e9


def same_answers(args, name, model, folder, server, *options):
    questions = [line.split("|")[0] for line in (folder / "questions.txt").read_text().splitlines()]
    passages = folder / "passages.jsonl"
    _, here, _ = run(args, model, passages, questions, *options)
    code, there, said = run(args, model, passages, questions, *options, "--decoder-url", server.url)
    what = " ".join(options) or "as the model says"
    check(f"{name}, {what}: answered", code == 0 and len(there) == len(here) == len(questions), said[-300:])
    check(f"{name}, {what}: no doubt about the decoder", "warning" not in said, said[:300])
    parted = [(a["answer"], b["answer"], margin(a, b)) for a, b in zip(here, there) if a["answer"] != b["answer"]]
    equal = len(questions) - len(parted)
    check(f"{name}, {what}: {equal} of {len(questions)} answers equal, the others part where two tokens lie within {NEAR_TIE} nats",
          len(here) == len(there) and all(nats < NEAR_TIE for _, _, nats in parted), parted)


def streams(args, server):
    """Text comes while the answer is being made, and an answer that is cut off is told of."""
    command = [args.refrag, "run", "-m", args.small, "--passages", ROOT / "bench/demo/passages.jsonl", "-q", "Tell me everything.", "-p", "0", "-n", "600",
               "--ignore-eos", "--decoder-url", server.url]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun, pieces = time.monotonic(), []
    while len(pieces) < 20:
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            break
        pieces.append((time.monotonic() - begun, piece))
    check("text streams", len(pieces) == 20 and process.poll() is None and pieces[-1][0] > pieces[0][0], pieces[-3:])
    server.kill()
    out, said = process.communicate(timeout=60)
    check("killed in the middle: exit code 1", process.returncode == 1, process.returncode)
    check("killed in the middle: one true line", b"the answer broke off" in said and said.count(b"\n") == 1, said)
    code, _, said = run(args, args.small, ROOT / "bench/demo/passages.jsonl", ["Who?"], "--decoder-url", server.url)
    check("gone: exit code 1, and where it was looked for", code == 1 and f"refrag: {server.url}/models: " in said, said)


def serves(args, server):
    """The server passes on what vLLM streams, and says 502 when it is gone."""
    command = [args.refrag, "serve", "-m", args.small, "--port", "0", "--decoder-url", server.url, "-p", "0.25"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    url = line.split(" on ")[1].split(" ")[0]
    documents = [json.loads(line) for line in (ROOT / "bench/demo/passages.jsonl").read_text().splitlines()]
    question = (ROOT / "bench/demo/questions.txt").read_text().splitlines()[0].split("|")[0]
    body = {"messages": [{"role": "user", "content": question}], "documents": documents, "max_tokens": 24, "stream": True}

    def post():
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.urlopen(request).read().decode()

    events = [json.loads(part[6:]) for part in post().split("\n\n") if part.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    _, here, _ = run(args, args.small, ROOT / "bench/demo/passages.jsonl", [question], "-p", "0.25")
    check("serve: a stream says what `run` says here", here and text.strip() == here[0]["answer"].strip(), (text, here and here[0]["answer"]))
    server.kill()
    try:
        post()
        check("serve: 502 when it is gone", False, "an answer")
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())["error"]
        check("serve: 502 when it is gone", error.code == 502 and found["code"] == "decoder_unavailable", (error.code, found))
    process.terminate()
    check("serve: ends well", process.wait() == 0, process.returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--refrag", default="build/refrag")
    parser.add_argument("--small", default="weights_tools/refrag-nano")
    parser.add_argument("--default", default="build/refrag-smol")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        def decoder_of(model):
            out = Path(made) / Path(model).name
            subprocess.run([sys.executable, "-m", "weights_tools.merge_decoder", model, str(out)], cwd=ROOT, check=True)
            return out

        small = decoder_of(args.small)
        with Vllm(small, CONTEXT, "--enable-prompt-embeds") as server:
            for options in (["-p", "0"], ["-p", "0.25"], ["--policy", "all"]):
                same_answers(args, "small", args.small, ROOT / "bench/demo", server, *options)
            streams(args, server)
        with Vllm(small, CONTEXT, "--enable-prompt-embeds") as server:
            serves(args, server)
        with Vllm(small, CONTEXT) as server:
            code, _, said = run(args, args.small, ROOT / "bench/demo/passages.jsonl", ["Who?"], "--decoder-url", server.url)
            check("without --enable-prompt-embeds: refused with what vLLM says", code == 1 and "enable-prompt-embeds" in said, said)
        if Path(args.default).is_dir():
            with Vllm(decoder_of(args.default), 8192, "--enable-prompt-embeds") as server:
                same_answers(args, "default", args.default, ROOT / "bench/demo/isles", server)
                same_answers(args, "default", args.default, ROOT / "bench/demo/isles", server, "--policy", "all")
        else:
            print(f"SKIP: the default model: no {args.default} (make model)")
    print(f"{len(passed)} passed, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
