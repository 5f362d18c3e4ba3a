"""Tests of convert_tokenizer.py on toy files built here; needs Python alone.

    python3 -m unittest weights_tools/test_convert_tokenizer.py
"""

import base64
import io
import json
import os
import pathlib
import struct
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import convert_tokenizer as convert  # noqa: E402

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def ranks_file(tokens: list) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value & 0xFFFFFFFFFFFFFFFF)


def model_file(pieces: list, trainer: dict = None, normalizer: dict = None) -> bytes:
    """pieces: (text, score, type); the two specs by field number."""
    out = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
    for number, spec, defaults in ((2, trainer, {3: 2, 35: 0, 43: -1}), (3, normalizer, {1: b"identity", 4: 0})):
        out += field(number, b"".join(field(key, value) for key, value in {**defaults, **(spec or {})}.items()))
    return out


TOY = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("ab", -2.0, NORMAL), ("bc", -1.0, NORMAL), ("abc", -3.0, NORMAL),
       ("<x>", 0.0, USER_DEFINED), ("a", -9.0, NORMAL), ("b", -10.0, NORMAL), ("c", -11.0, NORMAL), ("\u2581", -12.0, NORMAL)]


class Converter(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name: str, data=None) -> str:
        path = os.path.join(self.folder.name, name)
        if data is not None:
            pathlib.Path(path).write_bytes(data)
        return path

    def run_main(self, *arguments) -> tuple:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = convert.main(list(arguments))
        return code, err.getvalue()

    def refusal(self, *arguments) -> str:
        """The message; one line, exit code 3, and no file made."""
        out = self.path("out")
        code, message = self.run_main(*arguments, "--out", out)
        self.assertEqual(code, 3, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertFalse(os.path.exists(os.path.join(out, "tokenizer.json")))
        return message

    def refused_model(self, *arguments, **keywords) -> str:
        return self.refusal("sentencepiece", self.path("toy.model", model_file(*arguments, **keywords)))

    def test_one_pair_a_piece_in_rank_order(self):
        ranks = {"bc": 0, "ab": 1, "abc": 2, "abab": 3, "zz": 4, "zzz": 5, "qrs": 6}
        # abc is made as a + bc, zzz from the left; nothing makes qrs.
        self.assertEqual(convert.recover_merges(ranks), [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "ab"), ("z", "z"), ("zz", "z")])

    def test_ranks_become_byte_level(self):
        path = self.path("ranks", ranks_file(SINGLE_BYTES + [b" t", "é".encode(), b" th"]))
        tokenizer, config = convert.convert_llama3(path, "3.1", n_ranks=259)
        model = tokenizer["model"]
        self.assertEqual([model["vocab"][piece] for piece in ("!", "Ġ", "Ġt", "Ã©", "Ġth")], [0x21, 0x20, 256, 257, 258])
        self.assertEqual(model["merges"], [["Ġ", "t"], ["Ã", "©"], ["Ġt", "h"]])
        self.assertIs(model["ignore_merges"], True)
        names = [token["content"] for token in tokenizer["added_tokens"]]
        self.assertEqual((len(names), len(set(names)), names[9], names[255]), (256, 256, "<|eot_id|>", "<|reserved_special_token_247|>"))
        self.assertEqual([token["id"] for token in tokenizer["added_tokens"]], list(range(259, 515)))
        self.assertEqual(convert.llama3_special("3")[4:11], ["<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>",
                         "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>"])
        self.assertEqual(config["bos_token"], "<|begin_of_text|>")

    def test_qwen_takes_its_added_tokens_from_the_config(self):
        ranks = self.path("ranks", ranks_file(SINGLE_BYTES))
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        tokens = {"257": {"content": "<y>", "special": False, **flags}, "256": {"content": "<x>", "special": True, **flags}}
        config = self.path("config.json", json.dumps({"added_tokens_decoder": tokens, "kept": [1]}).encode())
        out = self.path("out")
        self.assertEqual(self.run_main("qwen3", ranks, "--config", config, "--out", out)[0], 0)
        tokenizer = json.loads(pathlib.Path(out, "tokenizer.json").read_text())
        self.assertEqual([(t["id"], t["content"], t["special"]) for t in tokenizer["added_tokens"]], [(256, "<x>", True), (257, "<y>", False)])
        self.assertEqual(tokenizer["normalizer"], {"type": "NFC"})
        self.assertEqual(json.loads(pathlib.Path(out, "tokenizer_config.json").read_text())["kept"], [1])
        self.assertEqual(sorted(os.listdir(out)), ["tokenizer.json", "tokenizer_config.json"])  # no temporary file is left

    def test_broken_ranks_are_refused(self):
        lines = ranks_file(SINGLE_BYTES)
        for data, expected in ((lines + b"Y* 256\n", "line 257: expected a token in base64"), (lines + b"YWI=\n", "line 257"),
                               (lines + b"YWI= x\n", "line 257"), (lines + b"YQ== 256\n", "expected each token once"),
                               (lines + b"YWI= 257\n", "expected the ranks 0 to 256"), (lines + b"YWI= 5\n", "expected the ranks"),
                               (ranks_file(SINGLE_BYTES[:-1]), "found none for 255"), (b"\xff\xfe\n", "line 1"), (lines, "expected LLaMA-3's 128000 ranks")):
            self.assertIn(expected, self.refusal("llama3", self.path("ranks", data)))
        self.assertIn("cannot be read", self.refusal("llama3", self.path("none")))

    def test_broken_qwen_configs_are_refused(self):
        ranks = self.path("ranks", ranks_file(SINGLE_BYTES))
        for data in (b"", b"[]", b"{}", b'{"added_tokens_decoder":{"x":{}}}', b'{"added_tokens_decoder":{"256":{"content":5}}}', b"[" * 100000):
            self.assertIn("added_tokens_decoder", self.refusal("qwen2", ranks, "--config", self.path("config.json", data)))
        token = '{"content":"<x>","special":true,"lstrip":false,"rstrip":false,"single_word":false,"normalized":false}'
        gap = '{"added_tokens_decoder":{"300":%s}}' % token
        self.assertIn("found ids 300 to 300", self.refusal("qwen2", ranks, "--config", self.path("config.json", gap.encode())))

    def test_sentencepiece(self):
        path = self.path("toy.model", model_file(TOY))
        tokenizer, config = convert.convert_sentencepiece(path, "prepend")
        self.assertEqual(tokenizer["model"]["merges"], [["b", "c"], ["a", "b"], ["a", "bc"]])
        self.assertEqual([(t["id"], t["content"], t["special"]) for t in tokenizer["added_tokens"]],
                         [(0, "<unk>", True), (1, "<s>", True), (2, "</s>", True), (6, "<x>", False)])
        self.assertEqual(tokenizer["normalizer"]["normalizers"][0], {"type": "Prepend", "prepend": "\u2581"})
        self.assertEqual(tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"], [1])
        self.assertEqual((config["bos_token"], config["eos_token"]), ("<s>", "</s>"))
        tokenizer, _ = convert.convert_sentencepiece(path, "metaspace")
        self.assertIsNone(tokenizer["normalizer"])
        self.assertEqual(tokenizer["pre_tokenizer"]["prepend_scheme"], "first")
        bare = self.path("bare.model", model_file(TOY, normalizer={3: 0}, trainer={41: -1}))
        tokenizer, config = convert.convert_sentencepiece(bare, "prepend")
        self.assertEqual([step["type"] for step in tokenizer["normalizer"]["normalizers"]], ["Replace"])
        self.assertEqual([step["type"] for step in tokenizer["decoder"]["decoders"]], ["Replace", "ByteFallback", "Fuse"])
        self.assertIsNone(tokenizer["post_processor"])

    def test_runs_with_one_score_grow_from_the_left(self):
        runs = [("a" * n, -1e9, NORMAL) for n in (2, 4, 3)]
        path = self.path("toy.model", model_file(TOY[:3] + TOY[7:] + runs))
        merges = convert.convert_sentencepiece(path, "prepend")[0]["model"]["merges"]
        self.assertEqual(merges, [["aaa", "a"], ["aa", "a"], ["a", "a"]])

    def test_sentencepiece_refusals(self):
        self.assertIn("model_type: expected bpe, found unigram", self.refused_model(TOY, trainer={3: 1}))
        self.assertIn("expected identity, found nmt_nfkc", self.refused_model(TOY, normalizer={1: b"nmt_nfkc", 2: b"x"}))
        self.assertIn("remove_extra_whitespaces: expected false, found true", self.refused_model(TOY, normalizer={4: 1}))
        self.assertIn("escape_whitespaces: expected true", self.refused_model(TOY, normalizer={5: 0}))
        self.assertIn("treat_whitespace_as_suffix", self.refused_model(TOY, trainer={24: 1}))
        self.assertIn("expected the byte piece <0x00>", self.refused_model(TOY, trainer={35: 1}))
        self.assertIn("an unused one", self.refused_model(TOY + [("u", 0.0, UNUSED)]))
        self.assertIn("found type 9", self.refused_model(TOY + [("u", 0.0, 9)]))
        self.assertIn("found 'ab'", self.refused_model(TOY + [("ab", -20.0, NORMAL)]))
        self.assertIn("a score of its own", self.refused_model(TOY + [("ca", -1.0, NORMAL)]))
        self.assertIn("a score of its own", self.refused_model(TOY + [("aa", -5.0, NORMAL), ("aaaa", -5.0, NORMAL)]))
        self.assertIn("found none for 'd'", self.refused_model(TOY + [("ad", -20.0, NORMAL)]))
        self.assertIn("expected a finite score", self.refused_model(TOY + [("ca", float("nan"), NORMAL)]))
        self.assertIn("one unknown piece, found 0", self.refused_model(TOY[1:]))
        self.assertIn("found no pieces", self.refusal("sentencepiece", self.path("x", b"")))

    def test_every_cut_and_every_changed_byte_is_converted_or_refused(self):
        data = model_file(TOY)
        damaged = [data[:size] for size in range(len(data))]
        damaged += [data[:at] + bytes([data[at] ^ flip]) + data[at + 1:] for at in range(len(data)) for flip in (0x01, 0x80, 0xFF)]
        path = self.path("toy.model")
        for one in damaged:
            pathlib.Path(path).write_bytes(one)
            try:
                convert.convert_sentencepiece(path, "prepend")
            except convert.BadInput as error:
                self.assertTrue(str(error).startswith(path))
                self.assertNotIn("\n", str(error))

    def test_wrong_usage_is_one_line_and_code_2(self):
        for arguments in ((), ("--out", "x"), ("gpt2", "f", "--out", "x"), ("llama3", "--out", "x"), ("qwen2", "f", "--out", "x"),
                          ("llama3", "f", "--config", "c", "--out", "x"), ("llama3", "f", "--all", "d", "--out", "x"), ("llama3", "f")):
            code, message = self.run_main(*arguments)
            self.assertEqual((code, message.count("\n")), (2, 1), message)

    def test_all_says_what_is_missing(self):
        self.assertIn("found none", self.run_main("--all", self.folder.name, "--out", self.path("out"))[1])


if __name__ == "__main__":
    unittest.main()
