"""Stage 5: the policy. It begins with words (../words.py), imitates "pick the chunks that hold the answer", then learns by GRPO on the answer's
log-perplexity under the frozen networks.

    python -m weights_tools.train.smol.policy weights_tools/train/configs/smol/policy.toml
"""
import sys
from pathlib import Path

import numpy as np
import torch

from ..common import train
from ..grpo import advantages, pick_log_probs, sample_picks, surrogate
from ..imitation import imitation, policy_logits
from ..model import n_expand
from ..words import begin_with_words
from .model import begin
from .questions import Asker, Template
from .rows import pack
from .sft import context_of, draw_task


def tasks_of(asker, template, rng, data, k, n=1):
    """[(task, question ids for the policy, question, answer, holders)]: at most n questions of a task whose answers are in its words."""
    while True:
        task = draw_task(asker, template, rng, data, k)
        asked = [q for q in task.qas if q[3]][:n]
        if asked and len(task.chunks) >= 4:
            return [(task, template.segments(text), question, answer, holders) for text, question, answer, holders in asked]


@torch.no_grad()
def rewards_of(model, template, tasks, picks):
    """Minus the log-perplexity of each task's answer with each of its picks [B, G, T'] expanded -> [B, G]"""
    rows = [context_of(template, task, set(pick)).row([(question, answer)])
            for (task, _, question, answer, _), some in zip(tasks, picks.tolist()) for pick in some]
    batch = pack(rows, model.decoder.dtype)
    at = batch.taught()
    _, nll = model.decoder.loss(model.hidden(batch)[at], batch.labels[at], torch.ones(int(at.sum())))
    total = torch.zeros(len(rows)).index_add_(0, batch.row[at], nll)
    return (-total / torch.bincount(batch.row[at], minlength=len(rows))).view(len(tasks), -1)


def grpo_loss(model, template, tasks, k, n_picks, group, clip, seed):
    """(loss, {figure}) of one update; pi_old is pi, so the ratio is 1 and only its gradient counts."""
    logits = policy_logits(model, [(t[0].chunks, t[1]) for t in tasks], k)
    picks = sample_picks(logits.detach(), n_picks, group, torch.Generator().manual_seed(seed))
    rewards = rewards_of(model, template, tasks, picks)
    new = pick_log_probs(logits, picks)
    return -surrogate(new, new.detach(), advantages(rewards), clip), {"reward": rewards.mean(), "spread": rewards.std(1).mean()}


def main(config):
    cfg, world, model = begin(config, ("encoder", "policy"))
    data = cfg["data"]
    template = Template(f"{data['folder']}/tokenizer.json", cfg["template"], model.end)
    asker = Asker(data["folder"], data["tasks"], data["sizes"], data["unanswerable"], data["others"])

    def loss_of(rng, fraction, number):
        k = int(rng.choice(data["question_chunk_lens"]))
        if fraction < data["imitation"]:
            tasks = [t for _ in range(data["imitation_tasks"]) for t in tasks_of(asker, template, rng, data, k, data["imitation_questions"])]
            loss, figures = imitation(model, [(task.chunks, asked, holders) for task, asked, _, _, holders in tasks], k)
        else:
            tasks = [tasks_of(asker, template, rng, data, k)[0] for _ in range(data["group_tasks"])]
            n_picks = n_expand(float(rng.choice(data["fractions"])), min(len(t[0].chunks) for t in tasks))
            loss, figures = grpo_loss(model, template, tasks, k, n_picks, data["group"], data["clip"], int(rng.integers(2**62)))
        return loss, sum(len(c) for t in {id(t[0]): t[0] for t in tasks}.values() for c in t.chunks), figures

    if not (Path(cfg["run"]["out"]) / "last.pt").exists():
        rng, chunks = np.random.default_rng(cfg["run"]["seed"]), []
        while len(chunks) < data["begin_with_words"]:
            chunks += tasks_of(asker, template, rng, data, int(rng.choice(data["question_chunk_lens"])))[0][0].chunks
        begin_with_words(model, chunks, cfg["run"]["seed"])
    train(cfg, model, loss_of, {"policy"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
