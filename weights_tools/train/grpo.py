"""Stage 5: the policy learns by GRPO which chunks to expand (paper, A.1). Everything else is frozen.

For each task G action sequences are drawn, each T' chunks one after another without replacement; the reward is minus the
log-perplexity of the true answer given the mixed input. A short imitation phase comes first, our own addition: a policy
with random weights tries chunks evenly, and on a CPU there is no time to find the rare good ones that way. It maximises the
log-probability of the chunks that hold the answer.

    python -m weights_tools.train.grpo configs/nano/policy.toml
"""
import sys

import torch

from .batches import Qa, Segments, Squad, Text
from .common import autocast, load_model, read_config, train
from .cpt import mixed_pieces
from .facts import FactMaker
from .model import BOS, MixedBatch, n_expand
from .reconstruct import chunked
from .sft import draw_task


def advantages(rewards):
    """rewards [B, G] -> (r - mean) / std over each group (population std); a group of equal rewards teaches nothing: zeros."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(std > 1e-6, centred / std.clamp_min(1e-6), torch.zeros_like(centred))


def sample_picks(logits, n_picks, group, generator):
    """Plackett-Luce draws: logits [B, L] (-inf: no chunk), -> picks [B, group, n_picks]. Adding Gumbel noise and sorting draws
    from exactly the distribution of picking one after another."""
    noise = -torch.log(torch.empty(logits.shape[0], group, logits.shape[1]).exponential_(generator=generator))
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


def policy_logits(model, tasks, k, with_grad=True):
    """Logits [B, L_max] with -inf past a task's own chunks. tasks: (chunks, question ids or [])"""
    questions = [chunked(q, k) for _, q in tasks]
    with torch.no_grad():
        emb = model.encode([c for (chunks, _), q in zip(tasks, questions) for c in [*chunks, *q]]).float()
    n_chunks = torch.tensor([len(chunks) for chunks, _ in tasks])
    n_all = n_chunks + torch.tensor([len(q) for q in questions])
    width = int(n_all.max())
    keep = torch.arange(width) < n_all[:, None]
    c = torch.zeros(len(tasks), width, emb.shape[1])
    c[keep] = emb
    is_chunk = torch.arange(width) < n_chunks[:, None]
    with torch.set_grad_enabled(with_grad):
        logits = model.policy(c, keep & ~is_chunk, keep)
        return logits.masked_fill(~is_chunk, float("-inf"))[:, : int(n_chunks.max())]


def rewards_of(model, tasks, picks, suffix):
    """Minus the log-perplexity of each task's target for each of its picks [B, G, T'] -> [B, G]. A task is (pieces maker, target)."""
    batch, seen = MixedBatch(), {}
    for b, (make_pieces, _) in enumerate(tasks):
        for pick in picks[b].tolist():
            batch.add_row(make_pieces(batch, set(pick)))
    # The same chunk is encoded once, however many rows hold its slot.
    unique = [seen.setdefault(tuple(c), len(seen)) for c in batch.chunks]
    ids, labels, slot_at, chunk_of = batch.tensors()
    with torch.no_grad(), autocast():
        slots = model.projector(model.encode([list(c) for c in seen]))[torch.tensor(unique)][chunk_of]
        losses = model.token_losses(model.hidden(ids, slots, slot_at), labels)
    rows = (labels != -100).nonzero()[:, 0]
    total = torch.zeros(len(batch.rows)).index_add_(0, rows, losses.float())
    return (-total / (labels != -100).sum(1)).view(len(tasks), -1)


def draw_tasks(data, rng, qa, text, k, n_tasks, on_text):
    """[(chunks, question ids or [], pieces maker, holders)]"""
    out = []
    for _ in range(n_tasks):
        if on_text:
            ids = text.window(rng, data["text_context"] + data["text_target"])
            chunks, target = chunked(ids[: data["text_context"]], k), ids[data["text_context"] :]
            make = lambda batch, expanded, chunks=chunks, target=target: [
                ("tokens", [BOS]), *mixed_pieces(batch, chunks, expanded), ("target", target)]
            out.append((chunks, [], make, []))
        else:
            while True:
                task = draw_task(data, rng, qa, k, data["max_context"])
                question, ids, answer, holders = task.qas[0]
                if holders and len(task.chunks) >= 4:
                    break
            make = lambda batch, expanded, task=task, ids=ids, answer=answer: [
                *task.context(batch, expanded, qa.suffix), ("tokens", ids), ("target", answer)]
            out.append((task.chunks, qa.segments(question), make, holders))
    return out


def main(config):
    cfg = read_config(config)
    run, data = cfg["run"], cfg["data"]
    torch.manual_seed(run["seed"])
    model = load_model(cfg, run["init"])
    text = Text(data["folder"], data["weights"])
    qa = Qa(Segments(data["folder"] + "/tokenizer.json"), cfg["template"], FactMaker("train"), Squad(data["folder"] + "/squad_train.json"))

    def imitate(rng, k):
        tasks = draw_tasks(data, rng, qa, text, k, data["imitation_tasks"], False)
        log_p = policy_logits(model, [t[:2] for t in tasks], k).log_softmax(1)
        held = torch.zeros_like(log_p, dtype=torch.bool)
        for b, (_, _, _, holders) in enumerate(tasks):
            held[b, holders] = True
        loss = -log_p.masked_fill(~held, float("-inf")).logsumexp(1).mean()
        found = held.gather(1, log_p.argmax(1, keepdim=True)).float().mean()
        return loss, sum(len(c) for t in tasks for c in t[0]), {"imitation": loss.item(), "first pick holds": float(found)}

    def grpo(rng, k):
        on_text = rng.random() < data["text_share"]
        tasks = draw_tasks(data, rng, qa, text, k, data["tasks"], on_text)
        n_picks = n_expand(float(rng.choice(data["fractions"])), min(len(t[0]) for t in tasks))
        logits = policy_logits(model, [t[:2] for t in tasks], k)
        picks = sample_picks(logits.detach(), n_picks, data["group"], torch.Generator().manual_seed(int(rng.integers(2**62))))
        rewards = rewards_of(model, [t[2:] for t in tasks], picks, qa.suffix)
        new = pick_log_probs(logits, picks)
        # One update a batch: pi_old is pi, so the ratio is 1 and only its gradient counts; the clip guards larger reuse.
        loss = -surrogate(new, new.detach(), advantages(rewards), data["clip"])
        return loss, int(picks.numel()), {"text reward" if on_text else "reward": float(rewards.mean()), "spread": float(rewards.std(1).mean())}

    def loss_of(rng, fraction):
        k = int(rng.choice(data["chunk_lens"]))
        return imitate(rng, k) if fraction < data["imitation"] else grpo(rng, k)

    train(cfg, model, loss_of, {"policy"})


if __name__ == "__main__":
    main(sys.argv[1])
