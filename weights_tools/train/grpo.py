"""Stage 5: the policy learns by GRPO which chunks to expand (paper, A.1). Everything else is frozen.

For each task G action sequences are drawn, each T' chunks one after another without replacement; the reward is minus the
log-perplexity of the true answer (of the following text, where there is no question) given the mixed input. A policy that sees
the question may begin with an imitation phase (imitation.py).

    python -m weights_tools.train.grpo configs/nano/policy.toml
"""
import sys

import numpy as np
import torch

from .common import train
from .cpt import mixed_pieces
from .imitation import encode_once, imitation, policy_logits
from .model import IGNORE, MixedBatch, n_expand
from .sft import draw_task
from .stage import begin, open_questions, open_text
from .words import begin_with_words


def advantages(rewards):
    """rewards [B, G] -> (r - mean) / std over each group (population std); a group of equal rewards teaches nothing: zeros."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(std > 1e-6, centred / std.clamp_min(1e-6), torch.zeros_like(centred))


def sample_picks(logits, n_picks, group, generator):
    """Plackett-Luce draws: logits [B, L] (-inf: no chunk), -> picks [B, group, n_picks]. Adding Gumbel noise and sorting draws
    from exactly the distribution of picking one after another."""
    noise = -torch.log(torch.empty(logits.shape[0], group, logits.shape[1]).exponential_(generator=generator)).to(logits.device)
    return (logits[:, None, :] + noise).topk(n_picks, dim=-1).indices


def pick_log_probs(logits, picks):
    """log pi(l_t | l_<t) for picks [B, G, T'] under logits [B, L] -> [B, G, T']"""
    b, g, t = picks.shape
    left = logits[:, None, :].expand(b, g, -1)
    out = []
    for i in range(t):
        at = picks[:, :, i : i + 1]
        out.append((left.gather(2, at) - left.logsumexp(2, keepdim=True)).squeeze(2))
        left = left.scatter(2, at, float("-inf"))
    return torch.stack(out, dim=2)


def surrogate(new, old, advantage, eps):
    """J of the paper (to maximise): new, old log-probabilities [B, G, T'], advantage [B, G]."""
    ratio, a = (new - old).exp(), advantage[..., None]
    return torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a).mean()


def rewards_of(model, tasks, picks):
    """Minus the log-perplexity of each task's target for each of its picks [B, G, T'] -> [B, G]. A task is a function that makes
    a row's pieces from (batch, set of expanded chunks)."""
    batch = MixedBatch()
    for b, make_pieces in enumerate(tasks):
        for pick in picks[b].tolist():
            batch.add_row(make_pieces(batch, set(pick)))
    ids, labels, slot_at, chunk_of = (t.to(model.device) for t in batch.tensors(64))
    with torch.no_grad():
        different, row_of = encode_once(model, batch.chunks)
        slots = model.projector(different)[row_of][chunk_of]
        losses = model.token_losses(model.hidden(ids, slots, slot_at), labels)
    rows = (labels != IGNORE).nonzero()[:, 0]
    total = torch.zeros(len(batch.rows), device=losses.device).index_add_(0, rows, losses.float())
    return (-total / (labels != IGNORE).sum(1)).view(len(tasks), -1)


def text_task(data, rng, model, text, k):
    """(chunks, question ids, maker of a row's pieces, holders) of the next paragraph, without a question."""
    context = int(rng.choice(data["text_context"]))
    ids = text.window(rng, context + data["text_target"])
    chunks, target = model.cut(ids[:context], k), ids[context:]
    return chunks, [], lambda batch, expanded: [("tokens", [model.bos]), *mixed_pieces(batch, chunks, expanded), ("target", target)], []


def question_tasks(data, rng, model, qa, k, n=1):
    """As text_task, of at most n questions about the same passages, of those whose answers are in them; each is to be asked alone."""
    while True:
        _, task = draw_task(data, rng, qa, model.cut, k, data["max_context"])
        asked = [q for q in task.qas if q[3]][:n]
        if asked and len(task.chunks) >= 4:
            break

    def maker(ids, answer):
        return lambda batch, expanded: [*task.context(batch, expanded, model.bos, qa.suffix), ("tokens", ids), ("target", answer)]

    return [(task.chunks, qa.segments(question), maker(ids, answer), holders) for question, ids, answer, holders in asked]


def main(config):
    cfg, world, model = begin(config)
    data = cfg["data"]
    text = open_text(cfg, world)
    asks = data["text_share"] < 1 or data["imitation"] > 0 or data.get("begin_with_words")
    qa = open_questions(cfg, model, follow_up=0.0) if asks else None

    def imitate(rng, k):
        tasks = [t for _ in range(data["imitation_tasks"]) for t in question_tasks(data, rng, model, qa, k, data.get("imitation_questions", 1))]
        loss, figures = imitation(model, [(chunks, ids, holders) for chunks, ids, _, holders in tasks], k)
        return loss, sum(len(c) for t in tasks for c in t[0]), figures

    def grpo(rng, k):
        on_text = rng.random() < data["text_share"]
        tasks = [text_task(data, rng, model, text, k) if on_text else question_tasks(data, rng, model, qa, k)[0] for _ in range(data["group_tasks"])]
        n_picks = n_expand(float(rng.choice(data["fractions"])), min(len(t[0]) for t in tasks))
        logits = policy_logits(model, [t[:2] for t in tasks], k)
        picks = sample_picks(logits.detach(), n_picks, data["group"], torch.Generator().manual_seed(int(rng.integers(2**62))))
        rewards = rewards_of(model, [t[2] for t in tasks], picks)
        new = pick_log_probs(logits, picks)
        # One update a batch: pi_old is pi, so the ratio is 1 and only its gradient counts; the clip guards larger reuse.
        loss = -surrogate(new, new.detach(), advantages(rewards), data["clip"])
        spread = rewards.std(1).mean()
        return loss, int(picks.numel()), {"text reward" if on_text else "reward": rewards.mean(), "spread": spread}

    def loss_of(rng, fraction, number):
        k = int(rng.choice(data["chunk_lens"]))
        return imitate(rng, k) if fraction < data["imitation"] else grpo(rng, k)

    if data.get("begin_with_words"):
        rng, chunks = np.random.default_rng(cfg["run"]["seed"]), []
        while len(chunks) < data["begin_with_words"]:
            chunks += question_tasks(data, rng, model, qa, int(rng.choice(data["chunk_lens"])))[0][0]
        begin_with_words(model, chunks, cfg["run"]["seed"])
    train(cfg, model, loss_of, {"policy"}, world)


if __name__ == "__main__":
    main(sys.argv[1])
