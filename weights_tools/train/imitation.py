"""How the policy is asked, and its imitation of "pick the chunks that hold the answer" (our own addition to the paper's GRPO, which begins
with a policy that tries chunks evenly and would need long to meet the rare good ones)."""
import torch


def encode_once(model, chunks):
    """(encoder embeddings of the different chunks, index [len(chunks)] of each one's row there): a chunk in several rows is encoded once."""
    seen, order = {}, []
    for c in chunks:
        if seen.setdefault(id(c), len(seen)) == len(order):
            order.append(c)
    return model.encode(order), torch.tensor([seen[id(c)] for c in chunks], device=model.device)


def policy_logits(model, tasks, k, encoder_learns=False):
    """Logits [B, L_max] with -inf past a task's own chunks. tasks: (chunks, question ids or [])"""
    sees = hasattr(model.policy, "question_type")
    questions = [model.cut(q, k) if sees else [] for _, q in tasks]
    with torch.set_grad_enabled(encoder_learns and torch.is_grad_enabled()):
        different, row_of = encode_once(model, [c for (chunks, _), q in zip(tasks, questions) for c in [*chunks, *q]])
        emb = different[row_of].float()
    n_chunks = torch.tensor([len(chunks) for chunks, _ in tasks], device=emb.device)
    n_all = n_chunks + torch.tensor([len(q) for q in questions], device=emb.device)
    width = torch.arange(int(n_all.max()), device=emb.device)
    keep = width < n_all[:, None]
    c = torch.zeros(len(tasks), len(width), emb.shape[1], device=emb.device)
    c[keep] = emb
    is_chunk = width < n_chunks[:, None]
    logits = model.policy(c, keep & ~is_chunk, keep)
    return logits.masked_fill(~is_chunk, float("-inf"))[:, : int(n_chunks.max())]


def imitation(model, tasks, k, encoder_learns=False):
    """(mean of minus the log-probability that the first pick holds part of the answer, {name: figure}). tasks: [(chunks, question ids,
    holders)], holders being the chunks that hold it, at least one."""
    log_p = policy_logits(model, [t[:2] for t in tasks], k, encoder_learns).log_softmax(1)
    held = torch.zeros_like(log_p, dtype=torch.bool)
    for b, (_, _, holders) in enumerate(tasks):
        held[b, holders] = True
    loss = -log_p.masked_fill(~held, float("-inf")).logsumexp(1).mean()
    found = held.gather(1, log_p.argmax(1, keepdim=True)).float().mean()
    return loss, {"imitation": loss.detach(), "first pick holds": found}
