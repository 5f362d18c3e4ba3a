"""Tests of convert.py on toy directories in the layouts of other codes.

    python -m unittest weights_tools.test_convert
"""
import contextlib
import io
import json
import os
import pickle
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, RobertaModel

from weights_tools import convert
from weights_tools.shards import Entry, entries_of, plan, write_sharded
from weights_tools.toy_models import TEXT, make_decoder, make_encoder
from weights_tools.train.batches import Segments
from weights_tools.train.export import load_directory
from weights_tools.train.model import MixedBatch

REFRAG = Path(__file__).parent.parent / "build/refrag"
GIVEN = ["--chunk-len", "8", "--pooling", "cls", "--normalize", "--special-tokens", "--segment-order", "passages,question",
         "--template", "question_prefix=Question: ", "--template", "question_suffix=\\nAnswer:"]


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def two_layers(d_enc=32, d_dec=64, between=nn.GELU):
    return nn.Sequential(nn.Linear(d_enc, d_dec), between(), nn.Linear(d_dec, d_dec))


class Base(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.tmp = Path(folder.name)
        self.source, self.out = self.tmp / "in", self.tmp / "out"
        self.source.mkdir()

    def networks(self, **changes):
        self.encoder = make_encoder(self.source / "encoder")
        self.decoder = make_decoder(self.source / "decoder", **changes)

    def save(self, module, name="projector.pt", prefix=""):
        state = module.state_dict() if isinstance(module, nn.Module) else module
        torch.save({prefix + k: v for k, v in state.items()}, self.source / name)
        return module

    def run_convert(self, *more, given=GIVEN):
        """(exit code, the error's lines)"""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = convert.main(["--in", str(self.source), "--out", str(self.out), *given, *more])
        self.assertFalse(self.out.with_name("out.tmp").exists())
        self.assertEqual(self.out.exists(), code == 0 or "--out" in err.getvalue())
        return code, err.getvalue()

    def refused(self, code, words, *more, given=GIVEN):
        found, error = self.run_convert(*more, given=given)
        self.assertEqual((found, error.count("\n")), (code, 1), error)
        for word in words:
            self.assertIn(word, error)

    def converted(self, *more):
        self.assertEqual(self.run_convert(*more), (0, ""))
        if REFRAG.exists():
            done = subprocess.run([REFRAG, "inspect", "-m", self.out, "-t", "1", "--device", "cpu"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
        return self.out

    def slots(self, ids):
        """Slots of the converted directory: first position, L2 norm, projector."""
        encoder = RobertaModel.from_pretrained(self.out / "encoder").eval()
        w = load_file(self.out / "projector.safetensors")
        with torch.no_grad():
            c = nn.functional.normalize(encoder(ids).last_hidden_state[:, 0], dim=-1)
            h = nn.functional.gelu(nn.functional.linear(c, w["fc1.weight"].float(), w["fc1.bias"].float()))
            return nn.functional.linear(h, w["fc2.weight"].float(), w["fc2.bias"].float())

    def same_slots(self, projector, bound=1e-6):
        ids = torch.tensor([[0, 7, 99, 200, 5, 2], [0, 8, 8, 31, 299, 2]])
        with torch.no_grad():
            expected = projector(nn.functional.normalize(self.encoder(ids).last_hidden_state[:, 0], dim=-1))
        # fp32 sums of at most 64 terms of size about 1.
        self.assertLess((self.slots(ids) - expected).abs().max().item(), bound)


class Layouts(Base):
    def test_folder_of_save_pretrained(self):
        self.networks()
        projector = self.save(two_layers())
        self.converted("--activation", "gelu", "--no-policy")
        self.same_slots(projector)
        for name in ("encoder/model.safetensors", "decoder/model.safetensors"):
            self.assertEqual((self.out / name).read_bytes(), (self.source / name).read_bytes())
        decoder = AutoModelForCausalLM.from_pretrained(self.out / "decoder").eval()
        ids = torch.tensor([[1, 30, 40, 50]])
        with torch.no_grad():
            self.assertTrue(torch.equal(decoder(ids).logits, self.decoder(ids).logits))
        refrag = json.loads((self.out / "refrag.json").read_text())
        self.assertEqual(refrag["template"], {"before": "", "passage_prefix": "", "passage_suffix": "", "question_prefix": "Question: ", "question_suffix": "\nAnswer:"})
        self.assertEqual((refrag["expand_fraction"], refrag["encoder"]["vocabulary"], refrag["chunk_lens"]), (0.0, "own", [8]))

    def test_spellings_of_two_layers(self):
        self.networks()
        names = [("net.0", "net.2"), ("0", "2"), ("fc1", "fc2"), ("linear1", "linear2"), ("layers.0", "layers.1"), ("module.proj.0", "module.proj.3"), ("mlp.9", "mlp.10")]
        for first, second in names:
            with self.subTest(first):
                projector = two_layers()
                state = projector.state_dict()
                torch.save({f"{first}.weight": state["0.weight"], f"{first}.bias": state["0.bias"], f"{second}.weight": state["2.weight"],
                            f"{second}.bias": state["2.bias"]}, self.source / "projector.pt")
                self.out = self.tmp / f"out-{first}"
                self.assertEqual(self.run_convert("--activation", "gelu", "--no-policy"), (0, ""))
                self.same_slots(projector)

    def test_one_linear_layer(self):
        self.networks()
        projector = self.save(nn.Linear(32, 64))
        self.converted("--no-policy")
        self.same_slots(projector)

    def test_one_linear_layer_too_wide(self):
        self.networks(hidden_size=60, head_dim=16)
        self.save(nn.Linear(32, 60))
        self.refused(3, ["projector.pt", "expected two linear layers, found one", "2 x 32 > 60"], "--no-policy")

    def test_checkpoint_with_scale_and_shift(self):
        encoder = make_encoder(self.tmp / "roberta")
        self.decoder = make_decoder(self.source / "decoder")
        (self.source / "decoder/tokenizer.json").rename(self.tmp / "tokenizer.json")
        projector = two_layers()
        state = {f"projection.{k}": v for k, v in projector.state_dict().items()} | {"scale": torch.tensor([1.5]), "shift": torch.tensor([-0.25])}
        torch.save({"config": {"chunk_size_k": 16}, "encoder_state_dict": {f"model.{k}": v + 0.01 for k, v in encoder.state_dict().items()},
                    "projector_state_dict": state, "policy_state_dict": {"output_head.weight": torch.zeros(1, 256)}, "step": 3}, self.source / "checkpoint.pt")
        self.refused(2, ["--encoder"], "--activation", "gelu", "--no-policy")
        self.refused(3, ["tokenizer.json", "convert_tokenizer.py"], "--activation", "gelu", "--no-policy", "--encoder", str(self.tmp / "roberta"))
        more = ["--encoder", str(self.tmp / "roberta"), "--decoder", str(self.tmp), "--activation", "gelu"]
        self.refused(3, ["checkpoint.pt", "expected the policy", "output_head.weight", "--no-policy"], *more)
        self.converted(*more, "--no-policy")
        with torch.no_grad():
            for p in encoder.parameters():
                p += 0.01
        self.encoder = encoder
        self.same_slots(lambda c: projector(c) * 1.5 - 0.25)

    def test_whole_model_in_one_file(self):
        encoder, decoder, projector = make_encoder(self.tmp / "encoder"), make_decoder(self.tmp / "decoder"), two_layers()
        state = {f"encoder.model.{k}": v for k, v in encoder.state_dict().items()} | {f"decoder._orig_mod.{k}": v for k, v in decoder.state_dict().items()}
        state |= {f"projector.proj.{k}": v for k, v in projector.state_dict().items()} | {"policy.net.0.weight": torch.zeros(8, 33)}
        torch.save(state, self.source / "refrag_full.pt")
        more = ["--encoder", str(self.tmp / "encoder"), "--decoder", str(self.tmp / "decoder"), "--no-policy"]
        self.refused(3, ["refrag_full.pt", "activation", "expected gelu", "found tanh"], *more, "--activation", "tanh")
        self.refused(2, ["--activation"], *more)
        self.converted(*more, "--activation", "gelu", "--max-shard-size", "100000")
        self.encoder = encoder
        self.same_slots(projector)
        self.assertTrue((self.out / "decoder/model.safetensors.index.json").exists())

    def test_pytorch_bin(self):
        self.networks(tie_word_embeddings=True)
        for side, model in (("encoder", self.encoder), ("decoder", self.decoder)):
            (self.source / side / "model.safetensors").unlink()
            torch.save(model.state_dict(), self.source / side / "pytorch_model.bin", _use_new_zipfile_serialization=side == "encoder")
        projector = self.save(two_layers())
        self.converted("--activation", "gelu", "--no-policy")
        self.same_slots(projector)
        self.assertNotIn("lm_head.weight", load_file(self.out / "decoder/model.safetensors"))

    def test_sharded_bin(self):
        self.networks()
        state = self.decoder.state_dict()
        (self.source / "decoder/model.safetensors").unlink()
        names = sorted(state)
        halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in halves.items():
            torch.save({n: state[n] for n in part}, self.source / "decoder" / file)
        index = {"weight_map": {n: f for f, part in halves.items() for n in part}}
        (self.source / "decoder/pytorch_model.bin.index.json").write_text(json.dumps(index))
        self.save(two_layers())
        self.converted("--activation", "gelu", "--no-policy")
        for name, tensor in load_file(self.out / "decoder/model.safetensors").items():
            self.assertTrue(torch.equal(tensor, state[name]), name)
        (self.source / "decoder/pytorch_model-00002-of-00002.bin").unlink()
        self.out = self.tmp / "out2"
        self.refused(3, ["pytorch_model-00002-of-00002.bin"], "--activation", "gelu", "--no-policy")

    def test_our_policy(self):
        self.networks()
        self.save(two_layers())
        torch.manual_seed(3)
        policy = {f"policy.{n}": torch.randn(s) for n, s in convert.policy_shapes(32, 16, 24, 2, True).items()}
        torch.save(policy, self.source / "policy.pt")
        self.refused(2, ["--policy-heads"], "--activation", "gelu")
        self.refused(2, ["--policy-heads", "divisor of the policy's width 16"], "--activation", "gelu", "--policy-heads", "3")
        self.converted("--activation", "gelu", "--policy-heads", "4", "--expand-fraction", "0.25")
        self.assertEqual(json.loads((self.out / "refrag.json").read_text())["policy"],
                         {"n_layers": 2, "n_heads": 4, "dim": 16, "hidden_dim": 24, "norm_eps": 1e-5, "sees_question": True})
        self.assertEqual(set(load_file(self.out / "policy.safetensors")), {n.removeprefix("policy.") for n in policy})

    def test_trainer_and_runtime_read_it(self):
        """Slots through the trainer, and the log-perplexity of the runtime, beside the modules that were saved."""
        for byte_fallback, projector in ((True, two_layers()), (False, nn.Linear(32, 64))):
            self.networks(byte_fallback=byte_fallback)
            self.save(projector)
            self.out = self.tmp / f"out-{byte_fallback}"
            self.assertEqual(self.run_convert("--activation", "gelu", "--no-policy")[0], 0)
            model, _ = load_directory(self.out)
            tokens = Segments(self.out / "decoder/tokenizer.json")
            with torch.no_grad():
                for text in TEXT:
                    for chunk in model.cut(tokens(text), 8):
                        ids = torch.tensor([[0, *chunk.encoder, 2]])
                        c = nn.functional.normalize(self.encoder(ids).last_hidden_state[:, 0], dim=-1)
                        torch.testing.assert_close(model.projector(model.encode([chunk])), projector(c), atol=1e-5, rtol=0)
            if not REFRAG.exists():
                continue
            (self.tmp / "text").write_text(" ".join(TEXT) * 2)
            done = subprocess.run([REFRAG, "eval", "perplexity", "-m", self.out, "--text", self.tmp / "text", "--context", "32", "--output", "16", "-k", "8", "-p", "0,0.5",
                                   "--policy", "model", "-o", "json", "-t", "1", "--device", "cpu"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            rows = {row["p"]: row for row in json.loads(done.stdout) if row["mode"] == "refrag"}
            ids = np.array(tokens((self.tmp / "text").read_text()))
            for p in (0.0, 0.5):
                means = []
                for begin in range(0, len(ids) - 47, 48):
                    window, batch = ids[begin : begin + 48], MixedBatch()
                    chunks = model.cut(window[:32].tolist() if begin == 0 else window[:32], 8)
                    # The policy that prefers none: the first ones are expanded.
                    pieces = [("tokens", c) if i < 4 * p else ("slot", batch.chunk(c)) for i, c in enumerate(chunks)]
                    batch.add_row([("tokens", [model.bos]), *pieces, ("target", window[32:])])
                    with torch.no_grad():
                        means.append(batch.losses(model)[0].double().mean().item())
                self.assertEqual(rows[p]["n"], len(means))
                self.assertAlmostEqual(rows[p]["log_perplexity"], float(np.mean(means)), delta=2e-4)


class Refusals(Base):
    def setUp(self):
        super().setUp()
        self.networks()
        self.save(two_layers())

    OK = ["--activation", "gelu", "--no-policy"]

    def test_hostile_pickles(self):
        trap = self.tmp / "executed"
        bombs = {"weight": Bomb(trap)}
        self.assertRaises(FileExistsError, lambda: [pickle.loads(pickle.dumps(bombs)) for _ in range(2)])
        trap.rmdir()
        for name in ("policy.pt", "encoder.pt", "checkpoint.pt", "refrag_full.pt", "projector.pt"):
            with self.subTest(name):
                for write in (lambda: torch.save(bombs, self.source / name), lambda: (self.source / name).write_bytes(pickle.dumps(bombs)),
                              lambda: torch.save(two_layers(), self.source / name), lambda: (self.source / name).write_bytes(b""),
                              lambda: (self.source / name).write_bytes(b"\x80\x02}q\x00")):
                    write()
                    self.refused(3, [name, "expected"], *self.OK)
                    self.assertFalse(trap.exists())
                (self.source / name).unlink()
        self.save(two_layers())
        (self.source / "decoder/model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Bomb(trap)}, self.source / "decoder/pytorch_model.bin")
        self.refused(3, ["pytorch_model.bin"], *self.OK)
        self.assertFalse(trap.exists())

    def test_projectors_that_do_not_map(self):
        norm = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))
        three = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        narrow = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 64))
        for module, words in ((norm, ["1.*", "LayerNorm"]), (three, ["4 [64, 64]"]), (narrow, ["0 [16, 32]", "2 [64, 16]"]), (two_layers(d_enc=48), ["[64, 48]"])):
            self.save(module)
            self.refused(3, ["projector.pt", "expected two linear layers, [64, 32] and [64, 64]", *words], *self.OK)
        self.save({"fc1.weight": torch.ones(64, 32, dtype=torch.int32), "fc2.weight": torch.ones(64, 64)})
        self.refused(3, ["fc1.weight", "expected F32", "int32"], *self.OK)
        self.save({"fc1.weight": torch.full((64, 32), float("nan")), "fc2.weight": torch.ones(64, 64)})
        self.refused(3, ["fc1.weight", "finite"], *self.OK)

    def test_activation(self):
        for name in ("relu", "tanh", "gelu_new", "gelu-tanh", "silu"):
            self.refused(3, ["projector.pt", "expected gelu", f"found {name}"], "--no-policy", "--activation", name)

    def test_policies_that_do_not_map(self):
        layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, norm_first=True)
        for state in ({"net.0.weight": torch.zeros(8, 33), "net.2.weight": torch.zeros(1, 8)},
                      {f"tr.layers.0.{k}": v for k, v in layer.state_dict().items()} | {"head.weight": torch.zeros(1, 32)},
                      {n: torch.zeros(s) for n, s in convert.policy_shapes(31, 16, 24, 2, True).items()}):
            torch.save(state, self.source / "policy.pt")
            self.refused(3, ["policy.pt", "expected the policy", "--no-policy"], "--activation", "gelu", "--policy-heads", "4")

    def test_what_must_be_given(self):
        for option in ("--chunk-len", "--pooling", "--segment-order", "--normalize", "--special-tokens", "--template"):
            given = list(GIVEN)
            while option in given:
                at = given.index(option)
                del given[at : at + (1 if option in ("--normalize", "--special-tokens") else 2)]
            self.refused(2, [option], *self.OK, given=given)
        self.refused(2, ["--no-policy"], "--activation", "gelu")
        self.refused(2, ["--template", "passage_prefix"], *self.OK, "--template", "prefix=x")
        self.refused(2, ["--template", "escapes"], *self.OK, "--template", "before=\\q")
        self.refused(2, ["--chunk-lens"], *self.OK, "--chunk-lens", "16,32")

    def test_files_that_are_wrong(self):
        (self.source / "decoder/tokenizer.json").unlink()
        self.refused(3, ["decoder", "tokenizer.json", "convert_tokenizer.py"], *self.OK)
        make_decoder(self.source / "decoder")
        config = json.loads((self.source / "decoder/config.json").read_text())
        for key, value, words in (("model_type", "gpt2", ["model_type", "llama or mistral", "'gpt2'"]), ("vocab_size", 32000, ["embed_tokens", "[32000, 64]"])):
            (self.source / "decoder/config.json").write_text(json.dumps(config | {key: value}))
            self.refused(3, words, *self.OK)
        (self.source / "decoder/config.json").write_text("{")
        self.refused(3, ["config.json", "expected JSON"], *self.OK)
        (self.source / "decoder/config.json").write_text(json.dumps(config))
        (self.source / "decoder/model.safetensors").write_bytes(b"\xff" * 64)
        self.refused(3, ["model.safetensors", "expected a safetensors file"], *self.OK)
        save_file({"wte.weight": torch.zeros(4)}, self.source / "decoder/model.safetensors")
        self.refused(3, ["expected model.embed_tokens.weight", "wte.weight"], *self.OK)
        (self.source / "decoder/model.safetensors").unlink()
        self.refused(3, ["decoder", "expected model.safetensors"], *self.OK)
        (self.source / "projector.pt").unlink()
        self.refused(3, ["expected projector.pt"], *self.OK)

    def test_existing_output(self):
        self.out.mkdir()
        (self.out / "mine").write_text("kept")
        self.refused(2, ["--out"], *self.OK)
        self.assertEqual([p.name for p in self.out.iterdir()], ["mine"])


class Shards(unittest.TestCase):
    def test_sizes(self):
        tensors = {f"t{i}": torch.arange(100 * (i + 1), dtype=torch.float32) for i in range(6)} | {"half": torch.ones(3, dtype=torch.bfloat16), "one": torch.tensor(1.0)}
        with tempfile.TemporaryDirectory() as folder:
            for limit in (2600, 3000, 10**6):
                for old in Path(folder).iterdir():
                    old.unlink()
                names = write_sharded(folder, entries_of(tensors), limit)
                back = {}
                for name in names:
                    if name.endswith(".safetensors"):
                        self.assertLessEqual((Path(folder) / name).stat().st_size, limit)
                        back |= load_file(Path(folder) / name)
                self.assertEqual(back.keys(), tensors.keys())
                for name in tensors:
                    self.assertTrue(torch.equal(back[name], tensors[name]))
                self.assertEqual(len(names) == 1, limit == 10**6)
            with self.assertRaisesRegex(ValueError, "t4: needs a file of"):
                plan(entries_of(tensors), 2000)

    def test_wrong_tensor(self):
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(ValueError, "expected .*float32 .2., found"):
            write_sharded(folder, [Entry("x", torch.float32, (2,), lambda: torch.zeros(3))], 1000)


if __name__ == "__main__":
    unittest.main()
