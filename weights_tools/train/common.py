"""What every stage shares: configuration, optimizer, schedule, checkpoints that resume exactly, and the loop.

A stage is bounded by `max_steps` and, if given, by `max_seconds` of training time, whichever comes first; the learning rate follows
the larger of the two fractions: linear warm-up, then cosine to a tenth. Batches are a function of (seed, step, part) alone, so
position in the data needs no state of its own.
"""
import json
import math
import os
import signal
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .model import Refrag


def read_config(path):
    """The run's TOML with the tables of the shared model file it names put in."""
    path = Path(path)
    cfg = tomllib.loads(path.read_text())
    return tomllib.loads((path.parent / cfg["model"]).read_text()) | cfg


def autocast():
    # No cache of cast weights: it would be shared between threads that each build a graph of their own.
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


class Optimizer:
    """Muon for the matrices inside the layers (it needs about half the tokens of AdamW here), AdamW for everything else."""

    def __init__(self, model, opt):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and "layer" in n]
        outer = [p for n, p in named if not (p.ndim == 2 and "layer" in n)]
        self.parts = []
        if opt.get("muon", True) and inner:
            self.parts.append((torch.optim.Muon(inner, lr=1.0, weight_decay=opt.get("weight_decay", 0.1), momentum=0.95,
                                                adjust_lr_fn="match_rms_adamw"), opt["lr"]))
        else:
            outer += inner
        self.parts.append((torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True), opt.get("adam_lr", opt["lr"])))
        self.params = [p for _, p in named]

    def step(self, scale, pool, clip=1.0):
        """One update at `scale` times the peak learning rates. Returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        for part, lr in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * scale
        list(pool.map(lambda part: part[0].step(), self.parts))
        return float(norm)

    def state_dict(self):
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states):
        for (part, _), state in zip(self.parts, states):
            part.load_state_dict(state)


def schedule(fraction, warmup):
    """Share of the peak learning rate when `fraction` of the stage is done."""
    if fraction < warmup:
        return max(fraction, 1e-3) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (fraction - warmup) / (1 - warmup))))


def save_atomic(state, path):
    temporary = f"{path}.tmp"
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_model(cfg, checkpoint=None):
    model = Refrag(cfg)
    if checkpoint:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model


def train(cfg, model, loss_of, trainable):
    """Runs one stage to its end, from its last checkpoint if there is one.

    loss_of(rng, fraction) -> (loss to descend, tokens read, {name: figure for the progress line}); trainable: the networks that learn.
    A step is the mean over `parts` such losses, each a small batch of its own, shared out to single-threaded workers. Workers that
    meet once a step keep their pace beside other programs; threads that meet at every matrix product do not.
    """
    run = cfg["run"]
    out = Path(run["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(cfg, indent=1))
    for name, part in model.named_children():
        part.requires_grad_(name in trainable)
    optimizer = Optimizer(model, cfg["optimizer"])
    parts = run.get("parts", 4)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(run.get("workers", 2), initializer=lambda: torch.set_num_threads(1))
    step, elapsed, tokens, last = 0, 0.0, 0, out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, elapsed, tokens = state["step"], state["elapsed"], state["tokens"]
        print(f"resumed at step {step}", flush=True)
    max_steps, max_seconds = run["max_steps"], run.get("max_seconds", math.inf)
    averages, saved_at = {}, time.time()

    def save():
        save_atomic({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": step,
                     "elapsed": elapsed, "tokens": tokens}, last)

    def gradient(part):
        with autocast():
            loss, n_tokens, figures = loss_of(np.random.default_rng([run["seed"], step, part]), fraction)
        return torch.autograd.grad(loss, optimizer.params, allow_unused=True), n_tokens, figures

    told_to_stop = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: told_to_stop.append(True))
    while step < max_steps and elapsed < max_seconds:
        began = time.time()
        fraction = max(step / max_steps, elapsed / max_seconds)
        results = list(pool.map(gradient, range(parts)))
        for param, *grads in zip(optimizer.params, *(r[0] for r in results)):
            grads = [g for g in grads if g is not None]
            param.grad = torch.stack(grads).sum(0) / parts if grads else None
        norm = optimizer.step(schedule(fraction, cfg["optimizer"].get("warmup", 0.04)), pool)
        step, tokens, elapsed = step + 1, tokens + sum(r[1] for r in results), elapsed + time.time() - began
        for name, value in (item for r in results for item in r[2].items()):
            averages[name] = value if name not in averages else 0.98 * averages[name] + 0.02 * value
        if step % run.get("print_every", 20) == 0:
            line = "  ".join(f"{k} {v:.3f}" for k, v in averages.items())
            print(f"step {step}  {elapsed:.0f} s  {fraction:.1%}  {tokens / elapsed:.0f} tokens/s  {line}  norm {norm:.2f}", flush=True)
        if told_to_stop or time.time() - saved_at > run.get("save_every_seconds", 120):
            save()
            saved_at = time.time()
        if told_to_stop:
            raise SystemExit(f"stopped at step {step}; the same command resumes")
    save()
    (out / "done.json").write_text(json.dumps({"steps": step, "seconds": round(elapsed), "tokens": tokens,
                                                "figures": {k: round(v, 4) for k, v in averages.items()}}))
    print(f"done: {step} steps, {elapsed:.0f} s, {tokens} tokens", flush=True)
