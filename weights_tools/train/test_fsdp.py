"""Checks of the recipe for real sizes on toy directories: another vocabulary's chunks, streams, and sharded training by torchrun with two
processes on the CPU (gloo): it learns, resumes exactly, leaves what is frozen alone, and equals one process within rounding.

    python -m unittest weights_tools.train.test_fsdp
"""
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from weights_tools.shards import open_weights
from weights_tools.toy_models import TEXT, byte_fallback_tokenizer, byte_level_tokenizer, make_decoder, make_encoder

from .batches import Segments
from .common import World, read_config, train
from .export import load_directory
from .model import MixedBatch
from .pretrained import Cutter, Pieces, chunk_texts, load_pretrained

ROOT = Path(__file__).parent.parent.parent
REFRAG = ROOT / "build/refrag"
REAL_TOKENIZERS = ROOT / "build/tokenizers"
AWKWARD = ["naïve café 東京 🙂", "a", "", " leading", "two  spaces\tand\n\nlines ", "👩‍👩‍👧‍👦 e\u0301 ﬁ Ⅷ", "x" * 40, "1234567 89", "ÿ\u00a0é😀😀", "don't we'll THE"]


def toml(tables):
    def value(v):
        return "{ " + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + " }" if isinstance(v, dict) else json.dumps(v)

    out = ""
    for name, table in tables.items():
        inner = {k: v for k, v in table.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
        out += f"[{name}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in inner.items())
        for k, rows in table.items():
            if k not in inner:
                out += "".join(f"[[{name}.{k}]]\n" + "".join(f"{a} = {value(b)}\n" for a, b in row.items()) for row in rows)
    return out


class Cutting(unittest.TestCase):
    """A chunk's encoder text is the characters whose first byte is in its span."""

    def test_first_bytes_by_hand(self):
        smile = "🙂".encode()
        self.assertEqual(chunk_texts([b"a", smile[:1], smile[1:3], smile[3:], b"b", b"c"], 2), ["a🙂", "", "bc"])
        self.assertEqual(chunk_texts([smile[2:], b"ab", b"c", smile[:3]], 2), ["ab", "c"])  # cut off on both sides
        self.assertEqual(chunk_texts([b"a", smile[:1], smile[1:2]], 1), ["a", "", ""])
        self.assertEqual(chunk_texts([], 4), [])

    def test_chunks_tile_the_text(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, tokenizer in (("bytes", byte_level_tokenizer(["<unk>", "<s>", "</s>"], 300, None)), ("fallback", byte_fallback_tokenizer())):
                tokenizer.save(f"{folder}/{name}.json")
                byte_level_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 320, ("<s>", "</s>")).save(f"{folder}/enc.json")
                segments, cut = Segments(f"{folder}/{name}.json"), Cutter(f"{folder}/{name}.json", f"{folder}/enc.json", 100)
                for text in AWKWARD + TEXT:
                    ids = segments(text)
                    for k in (1, 2, 3, 7):
                        texts = cut.texts(ids, k)
                        self.assertEqual("".join(texts), text, (name, k))
                        self.assertEqual(len(texts), -(-len(ids) // k))
                        chunks = cut(ids, k)
                        self.assertEqual([i for c in chunks for i in c], ids)
                        self.assertEqual([c.encoder for c in chunks], [cut.encoder.encode(t, add_special_tokens=False).ids for t in texts])

    def test_pieces_out_of_a_text(self):
        with tempfile.TemporaryDirectory() as folder:
            byte_fallback_tokenizer().save(f"{folder}/t.json")
            byte_level_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 320, None).save(f"{folder}/e.json")
            ids = Segments(f"{folder}/t.json")("the other the 東京 end")
            cut = Cutter(f"{folder}/t.json", f"{folder}/e.json", 3)
            pieces = cut.pieces
            self.assertTrue(pieces.adds_space)
            whole, middle = cut.texts(ids, 2), cut.texts(np.array(ids), 2)
            self.assertEqual(middle, [" " + whole[0], *whole[1:]])
            self.assertTrue(all(len(c.encoder) <= 3 for c in cut(ids, 8)))
            self.assertEqual(pieces.bytes_of[0], b"")

    def test_spans_of_the_runtime(self):
        if not REFRAG.exists():
            self.skipTest(f"{REFRAG}: not built")
        with tempfile.TemporaryDirectory() as folder:
            byte_fallback_tokenizer().save(f"{folder}/fallback.json")
            byte_level_tokenizer(["<unk>", "<s>", "</s>"], 300, None).save(f"{folder}/bytes.json")
            files = [Path(f"{folder}/fallback.json"), Path(f"{folder}/bytes.json"), *sorted(REAL_TOKENIZERS.glob("*/tokenizer.json"))]
            for file in files:
                table = json.loads(file.read_text())
                pieces, tokenizer = Pieces(file), Tokenizer.from_file(str(file))
                tokenizer.encode_special_tokens = True
                changes_text = any(word in json.dumps(table["normalizer"] or {}) for word in ("NFC", "NFKC"))
                keeps_first_space = "Metaspace" in json.dumps(table["pre_tokenizer"] or {})
                for text in AWKWARD + TEXT:
                    if not text or changes_text and "e\u0301" in text or keeps_first_space and text[0] == " ":
                        continue  # what ids alone do not say
                    done = subprocess.run([REFRAG, "tokenize", "--tokenizer", file, "--json", text], capture_output=True, text=True)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    said, data = json.loads(done.stdout), text.encode()
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                    self.assertEqual(said["ids"], ids)
                    ours = [pieces.bytes_of[i] for i in ids]
                    if pieces.adds_space:
                        ours[0] = ours[0].removeprefix(b" ")
                    self.assertEqual([data[a:b] for a, b in said["offsets"]], ours, (file, text))


class Streams(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def source(self, table, rank=0, size=1, shuffle=8):
        from datasets.distributed import split_dataset_by_node

        from .stream import Source, open_dataset

        rows = split_dataset_by_node(open_dataset({"name": "toy"} | table), rank=rank, world_size=size)
        return Source(rows, lambda text: [int(w) for w in text.split()], {"name": "toy"} | table, [7, 0, rank], shuffle)

    def rows(self, n=50):
        return [{"text": " ".join(str(1000 * i + j) for j in range(4 + i % 9)), "meta": {"set": "a" if i % 3 else "b"}} for i in range(n)]

    def test_resumed_in_every_format(self):
        rows = self.rows()
        (self.folder / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (self.folder / "t.txt").write_text("".join(r["text"] + "\n" for r in rows))
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        for i in (0, 1):
            Dataset.from_list(rows[25 * i : 25 * i + 25]).to_parquet(self.folder / f"p{i}.parquet")
        for file in ("t.jsonl", "t.txt", "p*.parquet"):
            table = {"path": str(self.folder / file)}
            for used in (0, 1, 30, 150):
                a = self.source(table)
                for _ in range(used):
                    a.window(3)
                state = copy.deepcopy(a.state_dict())
                b = self.source(table)
                b.load_state_dict(state)
                self.assertEqual([a.window(3).tolist() for _ in range(60)], [b.window(3).tolist() for _ in range(60)], (file, used))
            self.assertGreater(a.epoch, 0)

    def test_windows(self):
        (self.folder / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows()))
        table = {"path": str(self.folder / "t.jsonl"), "where": {"meta.set": "b"}}
        source, seen = self.source(table), []
        while source.epoch == 0:
            seen.append(source.window(4).tolist())
        self.assertTrue(all(w == list(range(w[0], w[0] + 4)) and w[0] % 4 == 0 and w[0] // 1000 % 3 == 0 for w in seen[:-1]))
        expected = sum((4 + i % 9) // 4 for i in range(0, 50, 3))
        self.assertEqual(len(seen) - 1, expected)
        self.assertNotEqual(seen[:-1], sorted(seen[:-1]))
        with self.assertRaisesRegex(ValueError, "toy: expected texts of 50 tokens"):
            import weights_tools.train.stream as stream

            limit, stream.MAX_REFUSED = stream.MAX_REFUSED, 200
            try:
                source.window(50)
            finally:
                stream.MAX_REFUSED = limit
        with self.assertRaisesRegex(ValueError, "expected rows with text"):
            self.source(table | {"where": {"meta.set": "c"}})
        with self.assertRaisesRegex(FileNotFoundError, "nothing"):
            self.source({"path": str(self.folder / "nothing*.jsonl")})

    def test_processes_share_rows(self):
        (self.folder / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows()))
        read = []
        for rank in (0, 1):
            source = self.source({"path": str(self.folder / "t.jsonl")}, rank, 2)
            rows = set()
            while source.epoch == 0:
                rows.add(source.window(4)[0] // 1000)
            read.append(rows)
        self.assertEqual(len(read[0] | read[1]), 50)


class Families(unittest.TestCase):
    """What pretrained.py makes of other decoders' directories, and a tied one sharded."""

    def cfg(self, folder, **run):
        return {"decoder": {"path": f"{folder}/decoder"}, "encoder": {"path": f"{folder}/encoder"},
                "policy": dict(dim=16, hidden_dim=32, n_heads=2, n_layers=2, norm_eps=1e-5, sees_question=False), "run": run}

    def test_logits_are_those_of_transformers(self):
        shape = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                     max_position_embeddings=128, bos_token_id=None, eos_token_id=[2, 5])
        for config, tied in ((MistralConfig, False), (Qwen2Config, True), (Qwen3Config, False), (LlamaConfig, True)):
            with self.subTest(config.__name__), tempfile.TemporaryDirectory() as folder:
                make_encoder(f"{folder}/encoder")
                torch.manual_seed(1)
                decoder = AutoModelForCausalLM.from_config(config(**shape, tie_word_embeddings=tied)).eval()
                decoder.to(torch.bfloat16).save_pretrained(f"{folder}/decoder", max_shard_size="30KB")
                byte_level_tokenizer(["<unk>", "<s>", "</s>"], 300, None).save(f"{folder}/decoder/tokenizer.json")
                model = load_pretrained(self.cfg(folder)).eval()
                self.assertEqual((model.bos, model.eos), (2, 2))
                self.assertEqual(model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight, tied)
                decoder = AutoModelForCausalLM.from_pretrained(f"{folder}/decoder", dtype=torch.float32).eval()
                ids = torch.tensor([[1, 30, 40, 50, 60]])
                with torch.no_grad():
                    torch.testing.assert_close(model.decoder.lm_head(model.hidden(ids)), decoder(ids).logits, atol=1e-6, rtol=0)

    def test_tied_embeddings_sharded(self):
        with tempfile.TemporaryDirectory() as folder:
            make_encoder(f"{folder}/encoder")
            make_decoder(f"{folder}/decoder", tie_word_embeddings=True)
            ends = []
            for sharding in ("none", "fsdp"):
                run = dict(out=f"{folder}/{sharding}", seed=1, max_steps=3, parts=2, sharding=sharding, precision="fp32", device="cpu")
                cfg = self.cfg(folder, **run) | {"optimizer": {"lr": 1e-2}}
                torch.manual_seed(0)
                model = load_pretrained(cfg)

                def loss_of(rng, fraction, number):
                    batch = MixedBatch()
                    ids = rng.integers(3, 290, 8)
                    if number % 2:  # no chunk in this one
                        batch.add_row([("tokens", [model.bos]), ("target", ids)])
                    else:
                        batch.add_row([("tokens", [model.bos]), *(("slot", batch.chunk(c)) for c in model.cut(ids, 4)), ("target", ids)])
                    return batch.loss(model), 1, {}

                train(cfg, model, loss_of, {"decoder", "encoder", "projector"}, World("cpu", 1))
                ends.append({k: v.read() for k, v in open_weights(f"{folder}/{sharding}/" + ("weights" if sharding == "fsdp" else "last.pt")).items()})
            self.assertNotIn("decoder.lm_head.weight", ends[1])
            for name, tensor in ends[1].items():
                # One process, the same sums; kernels of whole and sharded tensors may round differently.
                torch.testing.assert_close(tensor, ends[0][name], atol=1e-5, rtol=1e-4, msg=name)


class Sharded(unittest.TestCase):
    """Stages under torchrun. Reconstruction with a frozen decoder, then continual pre-training of everything."""

    @classmethod
    def setUpClass(cls):
        cls.tmp = tempfile.TemporaryDirectory()
        cls.folder = folder = Path(cls.tmp.name)
        make_encoder(folder / "roberta")
        make_decoder(folder / "llama", byte_fallback=True)
        text = " ".join(TEXT) * 20
        ids = Segments(folder / "llama/tokenizer.json")(text)
        (folder / "text").mkdir()
        np.save(folder / "text/a.npy", np.array(ids, dtype=np.uint16))
        (folder / "docs.jsonl").write_text("".join(json.dumps({"text": (" ".join(TEXT[i % 3 :] + TEXT[: i % 3])) * 3}) + "\n" for i in range(24)))
        (folder / "model.toml").write_text(toml({
            "decoder": {"path": str(folder / "llama")}, "encoder": {"path": str(folder / "roberta")},
            "policy": dict(dim=16, hidden_dim=32, n_heads=2, n_layers=2, norm_eps=1e-5, sees_question=False),
            "template": dict(before="", passage_prefix="", passage_suffix="\n", question_prefix="Q: ", question_suffix="\nA:"),
            "refrag": dict(chunk_len=4, chunk_lens=[4], expand_fraction=0.25)}))
        cls.launch("reconstruct", cls.config("reconstruct", "whole", freeze=["decoder"]), 2)
        cls.launch("reconstruct", cls.config("reconstruct", "parts", freeze=["decoder"]), 2, stop=6)
        cls.launch("reconstruct", cls.config("reconstruct", "parts", freeze=["decoder"]), 2)
        cls.launch("reconstruct", cls.config("reconstruct", "alone", freeze=["decoder"]), 1)
        cls.launch("reconstruct", cls.config("reconstruct", "unsharded", freeze=["decoder"], sharding="none"), 1)
        mixed = dict(activation_checkpointing=True, precision="bf16", tensorboard=True, init=str(folder / "whole/weights"), reduce_each_part=True)
        cls.launch("cpt", cls.config("cpt", "cpt", **mixed), 2)
        cls.launch("cpt", cls.config("cpt", "cpt-parts", **mixed), 2, stop=9)
        cls.launch("cpt", cls.config("cpt", "cpt-parts", **mixed), 2)
        cls.launch("sft", cls.real_config("sft", "cpt"), 2)
        cls.launch("grpo", cls.real_config("policy", "sft"), 2)

    @classmethod
    def tearDownClass(cls):
        cls.tmp.cleanup()

    @classmethod
    def config(cls, stage, name, **run):
        data = {"chunk_lens": [4], "chunk_len_weights": [1.0], "n_chunks": [1, 2, 4], "positions": 128}
        if stage == "reconstruct":
            data |= {"folder": str(cls.folder), "weights": {"a": 1.0}}
        else:
            data |= {"target": 16, "lengths": [48], "max_context": 64, "mixed_p": [0.1, 0.5], "shuffle": 4,
                     "shares": dict(compressed=0.4, mixed=0.2, rebuild=0.1, plain=0.3, questions=0.0),
                     "stream": [{"name": "docs", "path": str(cls.folder / "docs.jsonl"), "weight": 1.0}]}
        run = {"seed": 3, "out": str(cls.folder / name), "max_steps": 12 if stage == "reconstruct" else 24, "parts": 4, "device": "cpu", "threads": 1,
               "sharding": "fsdp", "precision": "fp32", "print_every": 4} | run
        path = cls.folder / f"{name}.toml"
        path.write_text('model = "model.toml"\n' + toml({"run": run, "optimizer": {"lr": 3e-3, "weight_decay": 0.01}, "data": data}))
        return path

    @classmethod
    def real_config(cls, name, init):
        """A stage of configs/llama-2-7b, made small."""
        cfg = read_config(Path(__file__).parent / f"configs/llama-2-7b/{name}.toml")
        cfg["run"] |= {"out": str(cls.folder / name), "init": str(cls.folder / init / "weights"), "device": "cpu", "threads": 1, "parts": 4, "max_steps": 8, "print_every": 4}
        cfg["optimizer"]["lr"] = 1e-2
        cfg["data"] |= {"folder": str(cls.folder), "chunk_lens": [4], "n_chunks": [1, 2], "positions": 256, "target": 16, "lengths": [48], "max_context": 400,
                        "text_context": [32], "text_target": 16, "group": 4, "fractions": [0.25], "tasks": {"facts": [1.0, 1]},
                        "stream": [{"name": "docs", "path": str(cls.folder / "docs.jsonl"), "weight": 1.0}]}
        path = cls.folder / f"{name}.toml"
        path.write_text('model = "model.toml"\n' + toml({k: cfg[k] for k in ("run", "optimizer", "data")}))
        return path

    @classmethod
    def launch(cls, stage, config, processes, stop=None):
        """Runs a stage; with stop, until so many parts have begun in each process, when it is told to stop as Ctrl-C would."""
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command += ["weights_tools.train.test_fsdp", "--stop", stage, str(config), str(stop)] if stop else [f"weights_tools.train.{stage}", str(config)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        if (done.returncode == 0) != (stop is None):
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    def weights(self, name):
        return {k: v.read() for k, v in open_weights(self.folder / name / "weights").items()}

    def test_resumed_runs_end_with_the_same_weights(self):
        for whole, parts in (("whole", "parts"), ("cpt", "cpt-parts")):
            a, b = self.weights(whole), self.weights(parts)
            self.assertEqual(a.keys(), b.keys())
            for name in a:
                self.assertTrue(torch.equal(a[name], b[name]), name)
            done = [json.loads((self.folder / run / "done.json").read_text()) for run in (whole, parts)]
            self.assertEqual(done[0]["tokens"], done[1]["tokens"])
            self.assertEqual(done[0]["figures"], done[1]["figures"])

    def test_what_is_frozen_stays(self):
        after = self.weights("whole")
        for name, stored in open_weights(self.folder / "llama").items():
            self.assertTrue(torch.equal(after[f"decoder.{name}"], stored.read()), name)
        before = open_weights(self.folder / "roberta")
        name = "encoder.layer.0.attention.self.query.weight"
        self.assertFalse(torch.equal(after[f"encoder.{name}"], before[name].read()))
        later = self.weights("cpt")
        self.assertTrue(all(torch.equal(after[n], later[n]) for n in after if n.startswith("policy.")))
        self.assertFalse(torch.equal(after["decoder.model.layers.0.mlp.up_proj.weight"], later["decoder.model.layers.0.mlp.up_proj.weight"]))

    def test_every_stage_changes_its_networks_alone(self):
        a, b, c = self.weights("cpt"), self.weights("sft"), self.weights("policy")
        for name in a:
            self.assertEqual(torch.equal(a[name], b[name]), name.startswith("policy."), name)
            self.assertEqual(torch.equal(b[name], c[name]), not name.startswith("policy."), name)
        for run, names in (("sft", {"answers"}), ("policy", {"text reward", "spread"})):
            self.assertLessEqual(names, json.loads((self.folder / run / "done.json").read_text())["figures"].keys())

    def test_real_configurations_are_the_papers(self):
        for model in ("llama-2-7b", "llama-3.1-8b"):
            read = {s: read_config(Path(__file__).parent / f"configs/{model}/{s}.toml") for s in ("reconstruct", "cpt", "sft", "policy")}
            self.assertEqual([read[s]["optimizer"]["lr"] for s in ("reconstruct", "cpt", "sft")], [2e-4, 5e-5, 2e-5])
            for name, cfg in read.items():
                self.assertEqual((cfg["run"]["sharding"], cfg["run"]["precision"], cfg["optimizer"]["warmup"]), ("fsdp", "bf16", 0.04))
                self.assertIn(model, cfg["run"]["out"])
            self.assertEqual(read["reconstruct"]["run"]["freeze"], ["decoder"])
            self.assertEqual((read["cpt"]["run"]["parts"], read["cpt"]["data"]["target"], read["cpt"]["data"]["max_context"]), (256, 2048, 2048))

    def test_processes_make_no_difference(self):
        two, one = self.weights("whole"), self.weights("alone")
        whole = {k: v.read() for k, v in open_weights(self.folder / "unsharded/last.pt").items()}
        start = {f"encoder.{k}": v.read() for k, v in open_weights(self.folder / "roberta").items()}
        for name in start.keys() & two.keys():
            moved = (two[name] - start[name]).norm()
            for other in (one, whole):
                # Sums of four parts' gradients in another order; Adam turns a gradient's rounding into as large a part of its step.
                self.assertLess((two[name] - other[name]).norm(), 1e-3 * moved + 1e-6, name)

    def test_losses_fall(self):
        for run, name in (("whole", "all"), ("cpt", "compressed k4")):
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            figures = json.loads((self.folder / run / "done.json").read_text())["figures"]
            self.assertIn(name, figures)
            if run == "cpt":
                events = EventAccumulator(str(self.folder / "cpt/tensorboard"))
                events.Reload()
                self.assertIn("rate", events.Tags()["scalars"])
                values = [e.value for e in events.Scalars(name)]
                self.assertLess(values[-1], values[0] - 0.1)
                self.assertAlmostEqual(values[-1], figures[name], places=3)

    def test_only_the_last_checkpoint_is_kept(self):
        for run, step in (("whole", 12), ("cpt", 24)):
            self.assertEqual([p.name for p in (self.folder / run).glob("checkpoint-*")], [f"checkpoint-{step}"])
            self.assertEqual(list((self.folder / run).glob("*.tmp")), [])

    def test_exported_directory(self):
        out = self.folder / "model"
        for extra in ([], ["--max-shard-size", "100000"]):
            done = subprocess.run([sys.executable, "-m", "weights_tools.train.export", str(self.folder / "model.toml"), "--checkpoint", str(self.folder / "cpt/weights"),
                                   "--out", str(out), "--dtype", "fp32", *extra], cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue((out / "decoder/model.safetensors.index.json").exists())
        self.assertFalse((out / "decoder/model.safetensors").exists())
        self.assertLessEqual(max(p.stat().st_size for p in out.rglob("*.safetensors")), 100000)
        model, refrag = load_directory(out)
        self.assertEqual(refrag["encoder"]["vocabulary"], "own")
        for name, tensor in self.weights("cpt").items():
            self.assertTrue(torch.equal(tensor, model.state_dict()[name]), name)
        if REFRAG.exists():
            done = subprocess.run([REFRAG, "inspect", "-m", out, "-t", "1", "--device", "cpu"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.same_log_perplexity(model, out)
        refused = subprocess.run([sys.executable, "-m", "weights_tools.train.export", str(self.folder / "model.toml"), "--checkpoint",
                                  str(self.folder / "cpt/weights"), "--out", str(out), "--max-total-size", "100000"], cwd=ROOT, capture_output=True, text=True)
        self.assertIn("expected at most 100000 bytes", refused.stderr)
        self.assertFalse(Path(f"{out}.tmp").exists())
        load_directory(out)

    def same_log_perplexity(self, model, out):
        """The runtime's figure with chunks of another vocabulary, and the trainer's."""
        text = self.folder / "eval.txt"
        text.write_text(" ".join(TEXT) + " " + " ".join(AWKWARD[:4]) + " " + " ".join(TEXT))
        done = subprocess.run([REFRAG, "eval", "perplexity", "-m", out, "--text", text, "--context", "16", "--output", "8", "-k", "4", "-p", "0", "-o", "json", "-t", "1",
                               "--device", "cpu"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        said = [r for r in json.loads(done.stdout) if r["mode"] == "refrag"][0]
        ids, means = np.array(Segments(out / "decoder/tokenizer.json")(text.read_text())), []
        first = model.cut(ids[:16], 4)  # the text's own beginning: a space that is not in it
        for begin in range(0, len(ids) - 23, 24):
            window, batch = ids[begin : begin + 24], MixedBatch()
            chunks = model.cut(window[:16].tolist() if begin == 0 else window[:16], 4)
            batch.add_row([("tokens", [model.bos]), *(("slot", batch.chunk(c)) for c in chunks), ("target", window[16:])])
            with torch.no_grad():
                means.append(batch.losses(model)[0].double().mean().item())
        self.assertNotEqual(first[0].encoder, model.cut(ids[:16].tolist(), 4)[0].encoder)
        self.assertEqual(said["n"], len(means))
        self.assertAlmostEqual(said["log_perplexity"], float(np.mean(means)), delta=2e-4)


def stop_after(stage, config, n_parts):
    """A stage in which each process tells itself to stop when its part n_parts begins."""
    import importlib

    module = importlib.import_module(f"weights_tools.train.{stage}")
    true_train, count = module.train, [0]

    def train(cfg, model, loss_of, trainable, world):
        def counted(*arguments):
            count[0] += 1
            if count[0] == n_parts:
                signal.raise_signal(signal.SIGINT)
            return loss_of(*arguments)

        return true_train(cfg, model, counted, trainable, world)

    module.train = train
    module.main(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stop"]:
        stop_after(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        unittest.main()
