"""What every stage shares: configuration, devices and processes, optimizer, schedule, checkpoints that resume exactly, the loop.

A stage is bounded by `max_steps` and, if given, by `max_seconds` of training time and `max_tokens` read, whichever comes first; the learning
rate follows the largest of the fractions. Batches are a function of (seed, step, part) alone, so position in the data needs no state of its
own and a step is the same whatever number of processes shares its parts. (Streams of text, stream.py, have a state, which is saved.)

Under `torchrun` every process takes its share of a step's parts. With `sharding = "none"` each holds the whole model and gradients
are averaged; with "fsdp" parameters, gradients and optimizer state are sharded (fsdp.py).
"""
import functools
import json
import math
import os
import signal
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from .loaders import Loader, Made
from .model import Refrag


def read_config(path):
    """The run's TOML on top of the files it names: `model`, the networks' shapes, and `base`, a run of which it is a variant. A key
    of a table replaces the same key below it."""
    path = Path(path)
    cfg = tomllib.loads(path.read_text())
    below = {}
    for key in ("base", "model"):
        if key in cfg:
            below = {k: below.get(k, {}) | v if isinstance(v, dict) else v for k, v in (below | read_config(path.parent / cfg[key])).items()}
    return below | {k: below.get(k, {}) | v if isinstance(v, dict) else v for k, v in cfg.items()}


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # counts and clocks stay on the host


def parts_of(run):
    """How many parts a step has."""
    return run.get("parts", 4)


class World:
    """The processes of a run and this one's device. One process when torchrun did not start it."""

    def __init__(self, device=None, threads=None):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(BACKENDS[kind])
        self.streams = {}  # name: what has a state of its own to be kept with checkpoints (stream.py)

    def sum(self, tensor):
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """[every process's value]"""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)


@functools.cache
def cpu_multiplies_bf16():
    """Whether products in bf16 are faster on this CPU than in fp32. It takes matrix instructions: an AMD EPYC of 2021 (two cores), which has
    none for bf16, multiplies [4096, 384] by [384, 1408] at 1.8 GFLOP/s so and at 106 in fp32; a Xeon with avx512_bf16 and no AMX (two cores)
    [1280, 576] by [576, 1536] at 72 and at 110 to 140."""
    info = Path("/proc/cpuinfo")
    return not info.exists() or not {"amx_bf16", "bf16"}.isdisjoint(info.read_text().split())


def computes_in_bf16(device, run):
    """[run] precision: "bf16" (products; parameters stay in fp32), "fp32", or "auto": what is fast on the device."""
    precision = run.get("precision", "auto")
    assert precision in ("auto", "bf16", "fp32"), f'[run] precision: expected "auto", "bf16" or "fp32", found "{precision}"'
    return precision == "bf16" or precision == "auto" and (torch.device(device).type != "cpu" or cpu_multiplies_bf16())


def autocast(device, run):
    """The context of a run's forward passes."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16) if computes_in_bf16(device, run) else nullcontext()


def orthogonalised(matrix, coefficients, steps, eps):
    """About U V^T of matrix [m, n] = U S V^T, by Newton-Schulz iterations X <- a X + (b X X^T + c (X X^T)^2) X of the dtype that
    the device multiplies fast. PyTorch's own are in bf16 everywhere, which on a CPU that emulates it took a third of a step of 8,192 tokens."""
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if computes_in_bf16(matrix.device, {}) else torch.float32, copy=True)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class SharedMuon(torch.optim.Muon):
    """Muon with Nesterov momentum, updates scaled to the RMS of AdamW's; its matrices are shared out over the processes: each
    orthogonalises its own and sends them to the others, the same bits as if all did all.

    The state to be saved is that of all matrices, whatever the number of processes; every process must ask for it."""

    def __init__(self, params, world, **options):
        super().__init__(params, **options)
        self.world, self.all = world, [p for group in self.param_groups for p in group["params"]]
        loads = [0] * world.size
        self.mine = set()  # positions in self.all, which are PyTorch's numbers in a state_dict
        costs = [p.numel() * min(p.shape) for p in self.all]
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = loads.index(min(loads))
            loads[least] += costs[i]
            if least == world.rank:
                self.mine.add(i)

    @torch.no_grad()
    def step(self):
        mine = {id(self.all[i]) for i in self.mine}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in mine:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                    update = orthogonalised(p.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"], group["ns_steps"], group["eps"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
        if self.world.size == 1:
            return
        flat = torch.cat([(p if i in self.mine else torch.zeros_like(p)).flatten() for i, p in enumerate(self.all)])
        for p, value in zip(self.all, self.world.sum(flat).split([p.numel() for p in self.all])):
            p.copy_(value.view_as(p))

    def state_dict(self):
        state = super().state_dict()
        parts = self.world.gather({i: s for i, s in state["state"].items() if i in self.mine})
        return state | {"state": {i: s for part in parts for i, s in part.items()}}


class Optimizer:
    """AdamW; with `muon` the matrices inside the layers take Muon instead (it needs about half the tokens at small sizes). With
    `rates` = {network = factor} a network learns at another rate than the others."""

    def __init__(self, model, opt, world):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decay, betas, rates = opt.get("weight_decay", 0.1), tuple(opt.get("betas", (0.9, 0.98))), opt.get("rates", {})
        inner, outer = {}, {}  # (rate of the network, weight decay): parameters
        for n, p in named:
            rate = rates.get(n.split(".")[0], 1.0)
            if opt.get("muon") and p.ndim == 2 and "layer" in n:
                inner.setdefault((rate, decay), []).append(p)
            else:  # norms and biases are not decayed
                outer.setdefault((rate, opt.get("adam_weight_decay", decay) if p.ndim >= 2 else 0.0), []).append(p)
        inner, outer = ([{"params": p, "rate": r, "weight_decay": d} for (r, d), p in groups.items()] for groups in (inner, outer))
        self.parts = []
        if inner:
            self.parts.append((SharedMuon(inner, world, lr=1.0, weight_decay=decay, momentum=0.95), opt["lr"]))
        self.parts.append((torch.optim.AdamW(outer, lr=1.0, betas=betas, fused=True), opt.get("adam_lr", opt["lr"])))
        self.params = [p for _, p in named]

    def set_scale(self, scale):
        for part, lr in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * scale * group["rate"]

    def step(self, scale, clip=1.0):
        """One update at `scale` times the peak learning rates. Returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
        self.set_scale(scale)
        for part, _ in self.parts:
            part.step()
        return norm

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states):
        ours, theirs = ([len(state["param_groups"]) for state in some] for some in (self.state_dict(), states))
        assert ours == theirs, f"the checkpoint's optimizer: expected {ours} groups, found {theirs}: muon, rates or the weight decays of [optimizer] changed"
        for (part, _), state in zip(self.parts, states):
            part.load_state_dict(state)


def schedule(fraction, opt):
    """Share of the peak learning rate when `fraction` of the stage is done: linear warm-up, then cosine to `final` of the peak or, with
    `decay`, level until the last `decay` of the stage and linear to `final` there."""
    warmup, final, decay = opt.get("warmup", 0.04), opt.get("final", 0.1), opt.get("decay")
    if fraction < warmup:
        return max(fraction, 1e-3) / warmup
    if decay:
        return final + (1 - final) * min(1.0, (1 - min(1.0, fraction)) / decay)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warmup) / (1 - warmup))))


def save_atomic(state, path):
    temporary = f"{path}.tmp"
    torch.save(state, temporary)
    os.replace(temporary, path)


def start_weights(cfg, start):
    """Weights to start from, {name: tensor}: of a checkpoint, of a model directory that export.py wrote, which carries a training from
    one machine to another (rounded to bf16, without the optimizer's state), or of the decoder alone, its directory in there. The tokenizer
    must be that of the data."""
    start = Path(start)
    if not start.is_dir():
        return torch.load(start, weights_only=True, map_location="cpu")["model"]
    from .export import load_directory, load_side

    whole = (start / "refrag.json").is_file()
    ours, theirs = Path(cfg.get("data", {}).get("folder", "")) / "tokenizer.json", start / "decoder/tokenizer.json" if whole else start / "tokenizer.json"
    assert not ours.is_file() or ours.read_bytes() == theirs.read_bytes(), f"{ours}: expected the tokenizer of {theirs}, found another"
    return load_directory(start)[0].state_dict() if whole else {k: v.read().float() for k, v in load_side(start, "decoder")[1].items()}


def load_model(cfg, checkpoint=None, fresh=()):
    """A model with the weights of what start_weights takes; the networks named in `fresh` keep their random ones, beside a decoder alone all others."""
    model = Refrag(cfg)
    if checkpoint:
        state = {k: v for k, v in start_weights(cfg, checkpoint).items() if k.split(".")[0] not in fresh}
        held = {k.split(".")[0] for k in state}
        model.load_state_dict(state | {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in held})
    return model


class WholeModel:
    """The model on every process alike; gradients are averaged in one flat reduction."""

    def __init__(self, model, optimizer, world):
        self.model, self.optimizer, self.world = model, optimizer, world

    def part(self, is_last):
        return nullcontext()

    def run(self, loss_of, *arguments):
        return loss_of(*arguments)

    def finish(self, out):
        """Nothing is left to do: last.pt has the whole weights."""

    def reduce_gradients(self):
        # A network that none of a process's parts used has no gradient there but may have one elsewhere.
        for p in self.optimizer.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world.size == 1:
            return
        params = self.optimizer.params
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)

    def save(self, extra, path):
        optimizer = self.optimizer.state_dict()  # of all processes together
        if self.world.rank == 0:
            save_atomic({"model": self.model.state_dict(), "optimizer": optimizer, **extra}, path)

    def load(self, path):
        if not path.exists():
            return None
        state = torch.load(path, weights_only=True, map_location=self.world.device)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        return state


class Log:
    """Running means of the figures, printed, and written for TensorBoard when `tensorboard = true`."""

    def __init__(self, run, out, world):
        self.means, self.world, self.writer = {}, world, None
        if run.get("tensorboard") and world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard")

    def add(self, figures):
        for name, value in figures.items():
            self.means[name] = value if name not in self.means else 0.98 * self.means[name] + 0.02 * value

    def show(self, step, line, scalars):
        self.world.say(f"step {step}  {line}  " + "  ".join(f"{k} {v:.3f}" for k, v in self.means.items()))
        if self.writer:
            for name, value in (self.means | scalars).items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def train(cfg, model, loss_of, trainable, world, evaluate=None):
    """Runs one stage to its end, from its last checkpoint if there is one.

    loss_of(rng, fraction, number) -> (loss to descend, tokens read, {name: figure for the progress line}); number counts parts from
    the stage's start; trainable: the networks that learn. A step descends the mean over `parts` such losses. With [run] loaders = N
    and a loss_of that is Made, N more processes make the batches. evaluate() -> {name: figure} is called every [run] evaluate_every
    steps and at the end. A model with `parameters_changed` is told of every update.
    """
    run, opt = cfg["run"], cfg["optimizer"]
    out = Path(run["out"])
    out.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        (out / "config.json").write_text(json.dumps(cfg, indent=1))
    for name, module in model.named_children():
        module.requires_grad_(name in trainable and name not in run.get("freeze", []))
    model.train()
    if run.get("sharding", "none") == "fsdp":
        from .fsdp import ShardedModel

        held = ShardedModel(model, opt, world, run)  # a whole model may not fit on the device
    else:
        model.to(world.device)
        held = WholeModel(model, Optimizer(model, opt, world), world)
    optimizer, parts = held.optimizer, parts_of(run)
    mine = range(world.rank, parts, world.size)
    assert parts % world.size == 0, f"[run] parts: expected a multiple of the {world.size} processes, found {parts}"
    loader = None
    if run.get("loaders") and isinstance(loss_of, Made):
        assert not world.streams, "[run] loaders: expected none with [data] stream, whose state is this process's"
        loader = Loader(loss_of.make, run, parts, mine, run["loaders"])
    log = Log(run, out, world)
    step, elapsed, tokens = 0, 0.0, 0
    state = held.load(out / "last.pt")
    if state:
        step, elapsed, tokens, log.means = state["step"], state["elapsed"], state["tokens"], state["means"]
        if world.streams:
            kept = state.get("streams", [])
            assert len(kept) == world.size, f"{out}: a stream was saved by {len(kept)} processes and cannot go on with {world.size}"
            for name, stream in world.streams.items():
                stream.load_state_dict(kept[world.rank][name])
        world.say(f"resumed at step {step}")
    max_steps, max_seconds, max_tokens, saved_at = run["max_steps"], run.get("max_seconds", math.inf), run.get("max_tokens", math.inf), time.time()
    changed = getattr(model, "parameters_changed", lambda: None)
    changed()

    def save():
        extra = {"step": step, "elapsed": elapsed, "tokens": tokens, "means": dict(log.means)}
        if world.streams:
            extra["streams"] = world.gather({name: stream.state_dict() for name, stream in world.streams.items()})
        held.save(extra, out / "last.pt")

    told_to_stop = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: told_to_stop.append(True))
    session, recent = (time.time(), tokens), (time.time(), tokens)

    def measure():
        model.eval()
        with torch.no_grad():
            found = evaluate()
        model.train()
        world.say(f"step {step}  {tokens} tokens  held out  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))

    while step < max_steps and elapsed < max_seconds and tokens < max_tokens:
        began = time.time()
        fraction = max(step / max_steps, elapsed / max_seconds, tokens / max_tokens)
        read, gathered = 0, []
        optimizer.zero_grad()
        for part in mine:
            with held.part(part == mine[-1]):
                with autocast(world.device, run):
                    if loader:
                        loss, n_tokens, figures = held.run(loss_of.loss, loader.take(step, part, elapsed / max_seconds))
                    else:
                        rng = np.random.default_rng([run["seed"], step, part])
                        loss, n_tokens, figures = held.run(loss_of, rng, fraction, step * parts + part)
                (loss / parts).backward()
            read += n_tokens
            gathered.append(figures)
        held.reduce_gradients()
        norm = optimizer.step(schedule(fraction, opt))
        changed()
        # What all processes must agree on: rank 0's clock, and whether anyone was told to stop.
        agreed = world.sum(torch.tensor([time.time() - began if world.rank == 0 else 0.0, read, float(bool(told_to_stop))], dtype=torch.float64))
        step, elapsed, tokens = step + 1, elapsed + agreed[0].item(), tokens + int(agreed[1])
        if step % run.get("print_every", 20) == 0 or step == max_steps:
            scalars = {"rate": schedule(fraction, opt), "norm": float(norm), "tokens": tokens}
            speed, lately = ((tokens - since[1]) / max(1e-9, time.time() - since[0]) for since in (session, recent))
            recent = time.time(), tokens
            log_line = f"{elapsed:.0f} s  {fraction:.1%}  {tokens} tokens  {speed:.0f} tokens/s, lately {lately:.0f}  norm {float(norm):.2f}"
        else:
            log_line = None
        for figures in gathered:
            log.add({k: float(v) for k, v in figures.items()})
        if log_line:
            log.show(step, log_line, scalars)
        if evaluate and step % run.get("evaluate_every", max_steps) == 0:
            measure()
        due = torch.tensor(float(world.rank == 0 and time.time() - saved_at > run.get("save_every_seconds", 180)))
        if agreed[2] or world.sum(due):
            save()
            saved_at = time.time()
        if agreed[2]:
            world.say(f"stopped at step {step}; the same command resumes")
            if loader:
                loader.close()
            raise SystemExit(3)
    save()
    if evaluate:
        measure()
    held.finish(out)
    if loader:
        loader.close()
    if world.rank == 0:
        (out / "done.json").write_text(json.dumps({"steps": step, "seconds": round(elapsed), "tokens": tokens,
                                                    "figures": {k: round(v, 4) for k, v in log.means.items()}}))
    world.say(f"done: {step} steps, {elapsed:.0f} s, {tokens} tokens")
