"""Every stage on toy data: it learns, resumes exactly, changes its own networks alone; and the runtime's log-probabilities beside the
trainer's where build/refrag (or $REFRAG_BINARY) exists.

    python -m unittest weights_tools.train.test_stages
"""
import contextlib
import io
import json
import os
import signal
import subprocess
import tempfile
import unittest
import unittest.mock
from pathlib import Path

import numpy as np
import torch

from . import cpt, grpo, pretrain, reconstruct, run_all, sft
from .batches import Qa, Segments, Text
from .common import load_model, read_config
from .evaluate import log_perplexity
from .export import export, load_directory
from .facts import FactMaker
from .imitation import imitation
from .model import BOS, EOS, MixedBatch, Refrag, chunked
from .prepare import make_tokenizer
from .stage import open_questions
from .tasks import Facts
from .test_train import SHAPE

TOY_TEMPLATE = dict(before="", passage_prefix="", passage_suffix="\n", question_prefix="Q: ", question_suffix="\nA:")


def toml(tables):
    def value(v):
        return "{ " + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + " }" if isinstance(v, dict) else json.dumps(v)

    return "".join(f"[{name}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in table.items()) for name, table in tables.items())


class Stages(unittest.TestCase):
    """Every stage on toy data."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.data = data = Path(cls.folder.name)
        words = " ".join(FactMaker("train").passage(np.random.default_rng(i))["text"] for i in range(60))
        make_tokenizer({"textbooks": [words]}, [], 300).save(str(data / "tokenizer.json"))
        ids = np.array(Segments(data / "tokenizer.json")(words) * 3, dtype=np.uint16)
        (data / "text").mkdir()
        np.save(data / "text/a.npy", ids)
        (data / "model.toml").write_text(toml(SHAPE | {"template": TOY_TEMPLATE, "refrag": dict(chunk_len=4, chunk_lens=[4], expand_fraction=0.25)}))
        before = None
        cls.runs = {}
        for module, name, lr in ((pretrain, "pretrain", 1e-2), (reconstruct, "reconstruct", 1e-2), (cpt, "cpt", 5e-3), (sft, "sft", 5e-3), (grpo, "policy", 3e-3)):
            cfg = cls.config(name, before, lr)
            (data / f"{name}.toml").write_text('model = "model.toml"\n' + toml(cfg))
            module.main(data / f"{name}.toml")
            before = data / name / "last.pt"
            cls.runs[name] = module, cfg

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def config(cls, name, init, lr):
        cfg = read_config(Path(__file__).parent / f"configs/nano/{name}.toml")
        run, data = cfg["run"], cfg["data"]
        for key in ("max_seconds", "start_encoder", "init"):
            run.pop(key, None)
        run |= {"out": str(cls.data / name), "max_steps": 40, "print_every": 10, "compile": False, "device": "cpu", "threads": 1, "parts": 2}
        if init:
            run["init"] = str(init)
        if name == "policy":
            run["max_steps"] = 100
            data |= {"imitation": 1.0}  # GRPO has a test of its own
        cfg["optimizer"] |= {"lr": lr, "adam_lr": lr}
        data |= {"folder": str(cls.data), "weights": {"a": 1.0}, "tasks": {"facts": [1.0, 2]}, "phases": [[0, 4, 64, 0.2, 0.3]], "positions": 256,
                 "lengths": [128], "target": 16, "max_context": 300, "max_asked": 150, "chunk_lens": [4], "chunk_len_weights": [1.0], "n_chunks": [1, 2, 4],
                 "group": 4, "imitation_tasks": 16, "begin_with_words": 200, "text_context": [32], "text_target": 16}
        return {k: cfg[k] for k in ("run", "optimizer", "data")}

    def loss_on_same_batches(self, name, checkpoint):
        """Mean loss of the stage's own batches of one late part of the run, under a checkpoint or (None) under what it began with."""
        module, cfg = self.runs[name]
        seen = []

        def instead(cfg_, model, loss_of, trainable, world):
            start = checkpoint or cfg_["run"].get("init")
            if start:
                model.load_state_dict(torch.load(start, weights_only=True)["model"])
            with torch.no_grad():
                for i in range(12):
                    seen.append(float(loss_of(np.random.default_rng([99, i]), 0.3, i)[0]))

        with unittest.mock.patch.object(module, "train", instead):
            module.main(self.data / f"{name}.toml")
        return float(np.mean(seen))

    def test_a_training_goes_on_from_a_model_directory(self):
        cfg = read_config(self.data / "sft.toml")
        export(cfg, load_model(cfg, self.data / "cpt/last.pt"), self.data / "tokenizer.json", self.data / "carried", dtype=torch.float32)
        want, got = (load_model(cfg, self.data / start, ["policy"]).state_dict() for start in ("cpt/last.pt", "carried"))
        for key in want:
            self.assertTrue(key.startswith("policy.") or torch.equal(want[key], got[key]), key)
        torch.manual_seed(1)
        random = Refrag(cfg).state_dict()
        torch.manual_seed(1)
        for key, value in load_model(cfg, self.data / "carried/decoder").state_dict().items():
            self.assertTrue(torch.equal(value, (want if key.startswith("decoder.") else random)[key]), key)
        tokenizer = self.data / "carried/decoder/tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        with self.assertRaisesRegex(AssertionError, "expected the tokenizer of .*carried/decoder/tokenizer.json, found another"):
            load_model(cfg, self.data / "carried")

    def test_run_all_starts_at_a_stages_border(self):
        configs = self.data / "configs"
        configs.mkdir()
        for name in ("cpt", "sft", "policy"):
            (configs / f"{name}.toml").write_text(f'base = "../{name}.toml"\n[run]\nout = "{configs / name}"\n')
        started = []

        def run(command, **_):
            started.append((command[-2], read_config(command[-1])))
            return unittest.mock.Mock(returncode=0)

        with unittest.mock.patch.object(subprocess, "run", run):
            run_all.main([str(configs), "--first", "sft", "--init", str(self.data)])
        (first, sft_cfg), (second, policy_cfg) = started
        self.assertEqual((first, second), ("weights_tools.train.sft", "weights_tools.train.grpo"))
        as_it_is = read_config(configs / "sft.toml")
        self.assertEqual(sft_cfg, as_it_is | {"base": sft_cfg["base"], "run": as_it_is["run"] | {"init": str(self.data)}})
        self.assertEqual(policy_cfg, read_config(configs / "policy.toml"))
        (configs / "policy-text.toml").write_text(f'base = "policy.toml"\n[run]\nout = "{configs / "policy-text"}"\n')
        with unittest.mock.patch.object(subprocess, "run", run):
            run_all.main([str(configs), "--first", "policy", "--init", str(self.data)])
        self.assertEqual([cfg["run"]["init"] for _, cfg in started[2:]], [str(self.data)] * 2)
        for wrong, message in ((["--first", "sft", "--until", "cpt"], "--first: expected a stage not after cpt"), (["--init", "nowhere"], "found nothing at nowhere"),
                               (["--init", str(self.data)], "pretrain.toml, which is to start from it; found none")):
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), self.assertRaises(SystemExit) as stopped:
                run_all.main([str(configs), *wrong])
            self.assertEqual(stopped.exception.code, 2)
            self.assertIn(message, errors.getvalue())

    def test_every_stage_lowers_its_loss(self):
        for name, factor in (("pretrain", 0.8), ("reconstruct", 0.98), ("cpt", 0.97), ("sft", 0.97), ("policy", 0.97)):
            with self.subTest(name):
                before, after = self.loss_on_same_batches(name, None), self.loss_on_same_batches(name, self.data / name / "last.pt")
                self.assertLess(after, factor * before)

    def test_grpo_finds_what_is_rewarded(self):
        """The reward is the share of picked chunks that lie in the first half."""
        module, cfg = self.runs["policy"]
        cfg = {k: dict(v) for k, v in cfg.items()}
        cfg["run"] |= {"out": str(self.data / "rewarded"), "max_steps": 60, "print_every": 60}
        cfg["optimizer"] = cfg["optimizer"] | {"lr": 1e-2}
        cfg["data"] |= {"text_share": 1.0, "imitation": 0.0, "text_context": [64], "fractions": [0.25], "group": 8}
        (self.data / "rewarded.toml").write_text('model = "model.toml"\n' + toml(cfg))
        seen = []

        def rewards(model, tasks, picks):
            out = [[np.mean([i < 8 for i in pick]) for pick in group] for group in picks.tolist()]  # of 64 / 4 chunks
            seen.append(float(np.mean(out)))
            return torch.tensor(out, dtype=torch.float32)

        with unittest.mock.patch.object(grpo, "rewards_of", rewards):
            module.main(self.data / "rewarded.toml")
        self.assertGreater(np.mean(seen[-20:]), np.mean(seen[:20]) + 0.2)

    def test_only_the_stages_networks_change(self):
        def state(name):
            return torch.load(self.data / name / "last.pt", weights_only=True)["model"]

        for name, init, fixed in (("reconstruct", "pretrain", ("policy",)), ("cpt", "reconstruct", ("policy",)),
                                  ("policy", "sft", ("decoder", "encoder", "projector"))):
            a, b = state(init), state(name)
            for key in a:
                if key.startswith(fixed):
                    self.assertTrue(torch.equal(a[key], b[key]), key)
            for network in {k.split(".")[0] for k in a} - set(fixed):
                self.assertTrue(any(not torch.equal(a[k], b[k]) for k in a if k.startswith(network)), (name, network))

    def test_an_interrupted_run_ends_with_the_same_weights(self):
        for name in ("pretrain", "sft", "policy"):
            module, cfg = self.runs[name]
            cfg = {k: dict(v) for k, v in cfg.items()}
            states = []
            for kind, stops in (("whole", [6]), ("parts", [2, 6])):
                cfg["run"]["out"] = str(self.data / f"{name}-{kind}")
                for stop in stops:
                    # The schedule depends on max_steps: it stays, and the run is told to stop as Ctrl-C would.
                    cfg["run"]["max_steps"] = 6
                    path = self.data / f"{name}-{kind}.toml"
                    path.write_text('model = "model.toml"\n' + toml(cfg))
                    if stop == 6:
                        module.main(path)
                    else:
                        with self.assertRaises(SystemExit) as raised, stopping_after(module, 2 * stop):
                            module.main(path)
                        self.assertEqual(raised.exception.code, 3)
                state = torch.load(self.data / f"{name}-{kind}/last.pt", weights_only=True)
                self.assertEqual(state["step"], 6)
                states.append(state)
            for key, value in states[0]["model"].items():
                self.assertTrue(torch.equal(value, states[1]["model"][key]), f"{name}: {key}")
            self.assertEqual(states[0]["tokens"], states[1]["tokens"])

    def test_batches_made_ahead_are_the_same(self):
        for name in ("pretrain", "sft"):
            module, cfg = self.runs[name]
            states = []
            for loaders in (0, 2):
                out = self.data / f"{name}-{loaders}-loaders"
                cfg = {k: dict(v) for k, v in cfg.items()}
                cfg["run"] |= {"out": str(out), "max_steps": 5, "loaders": loaders}
                (self.data / "ahead.toml").write_text('model = "model.toml"\n' + toml(cfg))
                module.main(self.data / "ahead.toml")
                states.append(torch.load(out / "last.pt", weights_only=True)["model"])
            self.assertTrue(all(torch.equal(states[0][k], states[1][k]) for k in states[0]), name)

    def test_question_rows_of_a_part_are_about_as_long_and_fit(self):
        _, cfg = self.runs["sft"]
        model, data = Refrag(SHAPE), cfg["data"] | {"positions": 700, "max_context": 400, "tasks": {"facts": [1.0, 6]}, "pool": 6}
        qa = open_questions(cfg | {"data": data, "template": TOY_TEMPLATE, "decoder": {}}, model)
        used, many = [], 0
        for seed in range(40):
            rng, batch = np.random.default_rng(seed), MixedBatch()
            rows = sft.draw_rows(data, np.random.default_rng(seed), qa, chunked, 4, seed / 40)
            sft.add_question_rows(batch, model, data, rng, qa, 4, seed / 40)
            lengths = [len(ids) for ids, _, _ in batch.rows]
            self.assertEqual(lengths, [task.length(expanded, qa.suffix) for task, expanded in rows])
            self.assertEqual(lengths, sorted(lengths))
            self.assertTrue(len(lengths) == 1 or len(lengths) * max(lengths) <= data["positions"], lengths)
            self.assertTrue(all(1 <= len(task.qas) and sum(len(q) + len(a) for _, q, a, _ in task.qas) <= 150 for task, _ in rows))
            used += [n / max(lengths) for n in lengths]
            many += len(lengths) > 1
            learnt = sum(sum(learnt) for _, _, learnt in batch.rows)
            answers = [len(answer) for task, _ in rows for _, _, answer, _ in task.qas]
            self.assertEqual(len(batch.weights), learnt)
            self.assertAlmostEqual(sum(batch.weights), sum(n**0.5 for n in answers))
        self.assertGreater(np.mean(used), 0.8)
        self.assertGreater(many, 20)

    def test_holders_are_the_chunks_of_the_answer_in_its_own_passage(self):
        qa = Qa(Segments(self.data / "tokenizer.json"), TOY_TEMPLATE)
        passages = [{"title": "Ash", "text": "The Ash is 40 km long."}, {"title": "Elm", "text": "It is 40 km away from the Elm, which is 73 km long."}]
        task = sft.Task(qa, passages, [("How long is the Elm?", "73 km", 1), ("And the Ash?", "40 km", 0), ("The Oak?", "not in the passages", None)], chunked, 4)
        held = [[task.chunks[i] for i in holders] for _, _, _, holders in task.qas]
        said = ["".join(qa.segments.tokenizer.decode(c) for c in chunks) for chunks in held]
        self.assertIn("73 km", said[0])
        self.assertIn("40 km", said[1])
        self.assertEqual([{task.passage_of[i] for i in holders} for _, _, _, holders in task.qas], [{1}, {0}, set()])

    def test_the_policy_imitates_on_the_first_question_about_a_passage(self):
        qa = Qa(Segments(self.data / "tokenizer.json"), TOY_TEMPLATE)
        passages = [{"title": "Ash", "text": "The Ash is 40 km long."}, {"title": "Elm", "text": "The Elm is 73 km long and 12 m deep."}]
        asked = [("How long is the Elm?", "73 km", 1), ("How deep is it?", "12 m", 1), ("The Oak?", "not in the passages", None), ("How long is the Ash?", "40 km", 0)]
        task = sft.Task(qa, passages, asked, chunked, 4)
        taken = sft.to_imitate(qa, task, 9)
        self.assertEqual([qa.segments.tokenizer.decode(question).strip() for _, question, _ in taken], ["How long is the Elm?", "How long is the Ash?"])
        self.assertEqual([holders for _, _, holders in taken], [task.qas[0][3], task.qas[3][3]])
        self.assertTrue(all(chunks is task.chunks for chunks, _, _ in taken))
        self.assertEqual(len(sft.to_imitate(qa, task, 1)), 1)

    def test_imitation_reaches_the_encoder_only_where_it_learns(self):
        torch.manual_seed(4)
        model = Refrag(SHAPE)
        tasks = [(chunked(list(range(10, 26)), 4), [12, 13], [2]), (chunked(list(range(30, 42)), 4), [31], [0, 1])]
        log_p = grpo.policy_logits(model, [t[:2] for t in tasks], 4).softmax(1)
        for learns in (False, True):
            model.zero_grad()
            loss, figures = imitation(model, tasks, 4, encoder_learns=learns)
            loss.backward()
            torch.testing.assert_close(loss, -(log_p[0, 2].log() + (log_p[1, 0] + log_p[1, 1]).log()) / 2)
            self.assertEqual(float(figures["first pick holds"]), ((log_p[0].argmax() == 2).float() + (log_p[1].argmax() < 2).float()) / 2)
            self.assertEqual(model.encoder.embeddings.word_embeddings.weight.grad is not None, learns)
            self.assertGreater(model.policy.head.weight.grad.abs().sum(), 0)

    def test_questions_of_the_policy_are_asked_alone(self):
        model, data = Refrag(SHAPE), self.runs["policy"][1]["data"] | {"questions": 12, "others": 3, "tasks": {"facts": [1.0, 4]}, "max_context": 400}
        qa = open_questions({"data": data, "template": TOY_TEMPLATE, "decoder": {}}, model, follow_up=0.0)
        numbers = set()
        for seed in range(20):
            tasks = grpo.question_tasks(data, np.random.default_rng(seed), model, qa, 4, n=3)
            numbers.add(len(tasks))
            self.assertTrue(all(holders and chunks is tasks[0][0] for chunks, _, _, holders in tasks))
            for _, question, _, _ in tasks:
                words = qa.segments.tokenizer.decode(question).replace("?", "").split()
                self.assertFalse({"it", "this"} & set(words), words)
            together = grpo.policy_logits(model, [t[:2] for t in tasks], 4)
            for logits, (chunks, question, _, _) in zip(together, tasks):
                torch.testing.assert_close(logits, grpo.policy_logits(model, [([list(c) for c in chunks], question)], 4)[0], atol=1e-5, rtol=1e-5)
        self.assertEqual(max(numbers), 3)

    def test_weights_of_targets_count_in_the_loss(self):
        torch.manual_seed(3)
        model, batch = Refrag(SHAPE), MixedBatch()
        batch.add_row([("tokens", [0, 7]), ("target", [5, 6])])
        batch.add_row([("tokens", [0]), ("target", [8])])
        with torch.no_grad():
            each, plain = batch.losses(model)[0], batch.loss(model)
            batch.weights = [0.5, 1.0, 2.5]
            weighted = batch.loss(model)
        torch.testing.assert_close(plain, each.mean(), rtol=2e-2, atol=0)  # bf16 products
        torch.testing.assert_close(weighted, (each * torch.tensor([0.5, 1.0, 2.5])).sum() / 4, rtol=2e-2, atol=0)
        self.assertGreater((weighted - plain).abs(), 0.01)

    def test_text_to_be_written_back_is_marked(self):
        _, cfg = self.runs["cpt"]
        text, model = Text(self.data, {"a": 1.0}), Refrag(SHAPE)
        data = cfg["data"] | {"shares": {"compressed": 0, "mixed": 0, "rebuild": 1, "plain": 0, "questions": 0}}
        batch, generators = MixedBatch(), [np.random.default_rng(i) for i in (1, 2)]
        self.assertEqual(cpt.text_step(batch, model, data, text, *generators, 1.0), "rebuild k4")
        self.assertGreater(len(batch.rows), 1)
        for ids, slots, learnt in batch.rows:
            self.assertEqual([t for t, _ in slots], list(range(1, 1 + len(slots))))
            self.assertEqual(ids[1 + len(slots)], EOS)
            self.assertEqual(learnt, [False] * (2 + len(slots)) + [True] * (4 * len(slots)))
            self.assertEqual(ids[2 + len(slots) :], [t for _, c in slots for t in batch.chunks[c]])

    def test_chunks_are_recalled_by_a_few_of_their_tokens(self):
        _, cfg = self.runs["cpt"]
        text, model = Text(self.data, {"a": 1.0}), Refrag(SHAPE)
        data = cfg["data"] | {"shares": {"compressed": 0, "mixed": 0, "recall": 1, "plain": 0, "questions": 0}, "n_chunks": [4], "rebuilt": 12}
        batch, generators = MixedBatch(), [np.random.default_rng(i) for i in (1, 2)]
        self.assertEqual(cpt.text_step(batch, model, data, text, *generators, 1.0), "recall k4")
        self.assertGreater(len(batch.rows), 1)
        orders, keys = set(), set()
        for ids, slots, learnt in batch.rows:
            self.assertEqual([t for t, _ in slots], [1, 2, 3, 4])
            chunks = [list(batch.chunks[c]) for _, c in slots]
            at, order = 5, []
            while at < len(ids):
                self.assertEqual((ids[at], learnt[at : at + 3]), (EOS, [False] * 3))
                end = next((i for i in range(at + 3, len(ids)) if not learnt[i]), len(ids))
                found = [i for i, c in enumerate(chunks) if ids[at + 1 : end] == c[-(end - at - 1) :]]
                self.assertTrue(found, (ids[at:end], chunks))
                order.append(found[0])
                keys.add(end - at - 3)
                at = end
            self.assertEqual(len(order), 3)  # `rebuilt` tokens of them
            orders.add(tuple(order))
        self.assertGreater(len(orders), 3)
        self.assertEqual(keys, {1, 2})  # targets: a key stands at the chunk's beginning or later

    def test_every_configuration_can_be_read(self):
        for path in sorted((Path(__file__).parent / "configs").rglob("*.toml")):
            cfg = read_config(path)
            self.assertTrue({"decoder", "encoder", "policy", "template"} <= cfg.keys(), path)
            if path.name != "model.toml":
                self.assertTrue({"seed", "out", "max_steps"} <= cfg["run"].keys() and "lr" in cfg["optimizer"], path)

    def test_runtime_gives_the_trainers_log_probabilities(self):
        binary = Path(os.environ.get("REFRAG_BINARY", "build/refrag"))
        if not binary.exists():
            self.skipTest(f"{binary}: not built")
        cfg = read_config(self.data / "policy.toml")
        export(cfg, load_model(cfg, self.data / "policy/last.pt"), self.data / "tokenizer.json", self.data / "dir", dtype=torch.float32)
        model, refrag = load_directory(self.data / "dir")
        rng, segments = np.random.default_rng(5), Segments(self.data / "tokenizer.json")
        passages, _, qas = Facts("test", no_answer=0.0).task(rng, 2)
        (self.data / "passages.jsonl").write_text("".join(json.dumps({"id": str(i), "title": p["title"], "text": p["text"]}) + "\n" for i, p in enumerate(passages)))

        def run(*arguments):
            done = subprocess.run([binary, *arguments, "-m", self.data / "dir", "--device", "cpu"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout)

        qa = Qa(segments, TOY_TEMPLATE)
        for policy, expanded in (("none", lambda n: set()), ("all", lambda n: set(range(n)))):
            said = run("run", "--passages", self.data / "passages.jsonl", "-q", qas[0][0], "-n", "8", "--ignore-eos", "--policy", policy, "--json",
                       "--logprobs", "3")
            task = sft.Task(qa, passages, [], chunked, 4)
            batch = MixedBatch()
            pieces = task.context(batch, expanded(len(task.chunks)), BOS, qa.suffix) + [("tokens", qa.question(qas[0][0]))]
            tokens = [t["id"] for t in said["logprobs"]]
            batch.add_row([*pieces, ("target", tokens)])
            with torch.no_grad():
                ours = -batch.losses(model)[0]
            theirs = torch.tensor([t["logprob"] for t in said["logprobs"]])
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        ids = segments("".join(f"{p['title']} {p['text']} " for p in passages) * 3)
        (self.data / "text.txt").write_text(segments.tokenizer.decode(ids))
        ids = segments((self.data / "text.txt").read_text())
        rows = run("eval", "perplexity", "--text", self.data / "text.txt", "--context", "32", "--output", "16", "-k", "4", "-p", "0,0.5", "-o", "json")
        windows = [ids[i : i + 48] for i in range(0, len(ids) - 47, 48)]
        for row in rows:
            with torch.no_grad():
                value, _ = log_perplexity(model, windows, 32, row["mode"], row["k"], row["p"], row["policy"])
            self.assertAlmostEqual(row["log_perplexity"], value, delta=1e-4, msg=str(row))


@contextlib.contextmanager
def stopping_after(module, n_parts):
    """Ctrl-C after so many parts of a step of a stage's run."""
    true_train = module.train

    def instead(cfg, model, loss_of, trainable, world):
        count = 0

        def counted(*arguments):
            nonlocal count
            count += 1
            if count == n_parts:
                signal.raise_signal(signal.SIGINT)
            return loss_of(*arguments)

        return true_train(cfg, model, counted, trainable, world)

    with unittest.mock.patch.object(module, "train", instead):
        yield


if __name__ == "__main__":
    unittest.main()
