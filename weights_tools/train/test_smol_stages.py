"""refrag-smol's stages one after another on toy data, as run_all.py runs them: what each changes, that it resumes exactly, what it exports.

    python -m unittest weights_tools.train.test_smol_stages
"""
import os
import subprocess
import tempfile
import unittest
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file

from weights_tools.gguf import Gguf, llama_weights

from .smol import export, run_all
from .smol.run_all import STAGES as MODULES
from .toy_smol import REPOSITORY, STAGES, ToyRun

MAINS = {stage: import_module(f".smol.{module}", __package__) for stage, module in MODULES.items()}


def binary():
    """The runtime, where it is built."""
    path = REPOSITORY / "build/refrag"
    return str(path) if path.is_file() else None


class Stages(unittest.TestCase):
    """All stages one after another, as run_all.py runs them, each for a few steps."""

    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(2)
        cls.kept = tempfile.TemporaryDirectory()
        cls.toy = ToyRun(cls.kept.name)
        cls.log = StringIO()
        cls.configs = {}
        with redirect_stdout(cls.log):
            for i, stage in enumerate(STAGES):
                cls.configs[stage] = cls.toy.config(stage, i)
                MAINS[stage].main(cls.configs[stage])

    @classmethod
    def tearDownClass(cls):
        cls.kept.cleanup()

    def weights(self, stage, checkpoint="last.pt"):
        return torch.load(self.toy.folder / stage / checkpoint, weights_only=True)["model"]

    def learnt(self, stage, before):
        """Networks of which a stage changed a weight."""
        a, b = self.weights(stage), self.weights(before)
        return {k.split(".")[0] for k in a if k in b and not torch.equal(a[k], b[k])}

    def test_each_stage_changes_its_networks_alone(self):
        self.assertEqual(self.learnt("warm", "reader"), set())
        self.assertEqual(self.learnt("reconstruct", "warm"), {"encoder", "projector"})
        self.assertEqual(self.learnt("cpt", "reconstruct"), {"encoder", "projector"})
        self.assertEqual(self.learnt("cpt-lora", "cpt"), {"encoder", "projector", "decoder"})
        self.assertEqual(self.learnt("sft", "cpt-lora"), {"encoder", "projector", "decoder"})
        self.assertEqual(self.learnt("policy", "sft"), set())
        self.assertIn("policy", {k.split(".")[0] for k in self.weights("policy")})
        self.assertNotIn("maps", {k.split(".")[0] for k in self.weights("reconstruct")})

    def test_a_stopped_stage_goes_on_to_the_same_weights(self):
        for stage in ("warm", "cpt-lora", "policy"):
            with self.subTest(stage):
                number, half = STAGES.index(stage), str(self.toy.folder / f"{stage}-half")
                with redirect_stdout(self.log):
                    for steps in (1, self.toy.STEPS):
                        # The learning rate and the curriculum follow max_steps: the first run is cut, not shorter.
                        module, path = MAINS[stage], self.toy.config(stage, number, {"out": half})
                        real = module.train
                        module.train = cut_after(real, steps)
                        try:
                            module.main(path)
                        finally:
                            module.train = real
                a, b = self.weights(stage), self.weights(f"{stage}-half")
                for name in a:
                    self.assertTrue(torch.equal(a[name], b[name]), name)

    def test_export(self):
        for stage in ("reader", "policy"):
            with self.subTest(stage):
                out = self.toy.folder / f"exported-{stage}"
                cfg = export.read_config(self.configs[stage])
                export.main([str(self.configs[stage]), "--out", str(out)])
                tensors = load_file(out / "model/decoder/model.safetensors")
                self.assertIn("model.layers.1.mlp.down_proj.weight", tensors)
                if stage == "policy":
                    state = self.weights(stage)
                    table = tensors["model.embed_tokens.weight"].float()
                    words = load_file(out / "model/encoder/model.safetensors")["embeddings.word_embeddings.weight"]
                    self.assertTrue(torch.equal(words, (table @ state["encoder.directions"]).bfloat16()))
                    self.assertEqual(words.shape, (len(table), cfg["encoder"]["hidden_size"]))
                    head = load_file(out / "model/projector.safetensors")
                    self.assertTrue(torch.equal(head["fc2.bias"], state["projector.fc2.bias"].bfloat16()))
                if binary():
                    shown = subprocess.run([binary(), "inspect", "-m", str(out / "model")], capture_output=True, text=True)
                    self.assertEqual(shown.returncode, 0, shown.stderr)

    def test_merged_weights_are_the_adapter_on_the_base(self):
        out = self.toy.folder / "exported-sft"
        export.main([str(self.configs["sft"]), "--out", str(out)])
        base = dict(llama_weights(Gguf(self.toy.folder / "toy.gguf")))
        adapter, merged = load_file(out / "adapter/adapter_model.safetensors"), load_file(out / "model/decoder/model.safetensors")
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            a, b = (adapter[f"base_model.{name}.lora_{x}.weight"].float() if f"base_model.{name}.lora_{x}.weight" in adapter
                    else adapter[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
            expected = torch.from_numpy(base[f"{name}.weight"]) + 2.0 * b @ a
            # bf16 keeps 8 bits, the first one included: half a unit of the last is at most 2^-8 of the value.
            self.assertTrue(((merged[f"{name}.weight"].float() - expected).abs() <= expected.abs() * 2**-8 + 1e-7).all())
            self.assertGreater((b @ a).abs().max(), 0)


class Gate(unittest.TestCase):
    """run_all.py on stages that are done and exported, with a runtime that says what it is told to."""

    def run_all(self, folder, found, refrag=True):
        folder = Path(folder)
        binary = folder / "refrag"
        if refrag:
            binary.write_text(f"""#!/bin/sh\necho "$@" >> {folder}/asked\necho '[{{"mode": "full", "exact_match": {found}}}]'\n""")
            binary.chmod(0o755)
        for i, stage in enumerate(("reader", "warm", "reconstruct")):
            gate = "[gate]\nexact_match = 0.45\n" if stage == "reader" else ""
            (folder / f"{stage}.toml").write_text(f'{gate}[run]\nout = "{folder}/{i}"\n[data]\nfolder = "{folder}/data"\n[refrag]\nchunk_lens = [8, 16]\n')
            for path in (f"{i}/done.json", f"out/{stage}/model/refrag.json"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text("{}")
        with redirect_stdout(StringIO()) as said:
            run_all.main([str(folder), "--out", str(folder / "out"), "--last", "reconstruct", "--refrag", str(binary)])
        return said.getvalue(), (folder / "asked").read_text().splitlines()

    def test_passes(self):
        with tempfile.TemporaryDirectory() as folder:
            said, asked = self.run_all(folder, 0.5)
            self.assertIn("reader: exact match 0.500", said)
            self.assertEqual([line.split()[1] for line in asked], ["qa", "qa", "qa", "perplexity"])
            self.assertIn("--modes full ", asked[0] + " ")
            self.assertIn("-k 8,16", asked[2])

    def test_fails(self):
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(SystemExit, "expected an exact match of 0.45 .* found 0.440"):
            self.run_all(folder, 0.44)

    def test_cannot_measure(self):
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(SystemExit, "no way to measure"):
            self.run_all(folder, 0.5, refrag=False)


def cut_after(train, steps):
    """`train` that is told to stop after so many steps."""
    def cut(cfg, model, loss_of, *more):
        def counted(rng, fraction, number):
            if number == (steps - 1) * cfg["run"]["parts"] and steps < cfg["run"]["max_steps"]:
                os.kill(os.getpid(), 15)
            return loss_of(rng, fraction, number)

        try:
            train(cfg, model, counted, *more)
        except SystemExit as stopped:
            assert stopped.code == 3
    return cut


if __name__ == "__main__":
    unittest.main()
