"""The four networks of a refrag model in PyTorch, and the mixed input that joins them (paper, section 2).

LLaMA and RoBERTa are the modules of `transformers`, so weights are saved under their own names; projector and policy are
ours, named as in `projector.safetensors` and `policy.safetensors`. Not an inference engine: there is no KV cache here.
Shapes: B rows of the batch, T positions, N chunks, d_dec and d_enc the two widths, L sensed chunks of a row.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

BOS, PAD, EOS = 0, 1, 2
IGNORE = -100  # label of a position without a target


class Projector(nn.Module):
    """e = fc2(gelu(fc1(c))), c [N, d_enc] -> e [N, d_dec]"""

    def __init__(self, d_enc, d_dec):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_enc, d_dec), nn.Linear(d_dec, d_dec)

    def forward(self, c):
        return self.fc2(F.gelu(self.fc1(c)))


class PolicyLayer(nn.Module):
    """Pre-norm transformer layer, bidirectional; x [B, L, D], keep [B, L] true where there is a chunk."""

    def __init__(self, dim, hidden_dim, n_heads, eps):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x, keep):
        b, n, dim = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, n, self.n_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = x + self.o(a.transpose(1, 2).reshape(b, n, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Policy(nn.Module):
    """One logit per chunk from the chunk embeddings (before the projector) and, if it sees it, the question's chunks."""

    def __init__(self, d_enc, dim, hidden_dim, n_heads, n_layers, norm_eps, sees_question):
        super().__init__()
        self.in_proj = nn.Linear(d_enc, dim)
        self.layers = nn.ModuleList(PolicyLayer(dim, hidden_dim, n_heads, norm_eps) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head = nn.Linear(dim, 1)
        if sees_question:
            self.question_type = nn.Parameter(torch.zeros(dim))

    def forward(self, c, is_question, keep):
        """c [B, n, d_enc], is_question and keep bool [B, n]; the row's L sensed chunks come first, then its question's, from
        position L on, then padding. Returns logits [B, n]; those of questions and padding mean nothing."""
        n, dim = c.shape[1], self.in_proj.out_features
        angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
        pe = torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(n, dim)
        x = self.in_proj(c) + pe
        if hasattr(self, "question_type"):
            x = x + is_question[..., None] * self.question_type
        for layer in self.layers:
            x = layer(x, keep)
        return self.head(self.norm(x)).squeeze(-1).float()


class VocabularyLoss(torch.autograd.Function):
    """Cross-entropy straight from hidden states, a few rows at a time, gradients included.

    Logits of all rows at once would be the largest tensor of a step, written and read a dozen times; piece by piece they stay in
    the cache, which halves the loss's time on a CPU. hidden [M, d], weight [V, d], targets [M], share [M] -> (sum of share * nll,
    nll [M] without gradient). Products in bf16, the rest in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, share, piece=256):
        w, h = weight.to(torch.bfloat16), hidden.to(torch.bfloat16)
        nll, dh = torch.empty(len(targets)), torch.empty_like(h)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(targets), piece):
            at = slice(begin, begin + piece)
            logits, target = (h[at] @ w.T).float(), targets[at, None]
            total = logits.logsumexp(1, keepdim=True)
            nll[at] = (total - logits.gather(1, target)).squeeze(1)
            # The gradient of nll is softmax minus one-hot; made in place.
            grad = logits.sub_(total).exp_().scatter_add_(1, target, torch.full(target.shape, -1.0)).mul_(share[at, None]).to(torch.bfloat16)
            dh[at] = grad @ w
            if dw is not None:
                dw += grad.T @ h[at]
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(nll)
        return (nll * share).sum(), nll

    @staticmethod
    def backward(ctx, upstream, _):
        dh, dw = ctx.saved_tensors
        return dh * upstream, None if dw is None else dw * upstream, None, None, None


class Refrag(nn.Module):
    def __init__(self, cfg):
        """cfg: the [decoder], [encoder], [policy] tables of a configuration file."""
        super().__init__()
        self.cfg = cfg
        d, e, p = cfg["decoder"], cfg["encoder"], cfg["policy"]
        self.decoder = LlamaForCausalLM(LlamaConfig(**d, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, attn_implementation="sdpa"))
        self.encoder = RobertaModel(
            RobertaConfig(**e, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, attn_implementation="sdpa",
                          hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            add_pooling_layer=False,
        )
        self.projector = Projector(e["hidden_size"], d["hidden_size"])
        self.policy = Policy(e["hidden_size"], **p)

    def start_encoder_from_decoder(self):
        """Word embeddings of the encoder := the decoder's trained ones in their first d_enc principal directions. Both read
        the same ids, so the encoder begins with tokens already sorted by meaning; the projector begins as the way back."""
        with torch.no_grad():
            w = self.decoder.model.embed_tokens.weight.float()
            d_enc, mean = self.cfg["encoder"]["hidden_size"], w.mean(0)
            _, _, v = torch.linalg.svd(w - mean, full_matrices=False)
            x = (w - mean) @ v[:d_enc].T
            self.encoder.embeddings.word_embeddings.weight.copy_(x / x.std() * 0.5)
            self.encoder.embeddings.position_embeddings.weight.normal_(0, 0.15)

    def encode(self, chunks):
        """chunks: list of id lists -> chunk_emb [N, d_enc]: the mean over <s> ids </s>."""
        width = max(map(len, chunks)) + 2
        ids = torch.full((len(chunks), width), PAD)
        ids[:, 0] = BOS
        for i, chunk in enumerate(chunks):
            ids[i, 1 : len(chunk) + 1] = torch.as_tensor(chunk)
            ids[i, len(chunk) + 1] = EOS
        keep = ids != PAD
        # Without a mask attention takes its fast path: chunks are nearly always of one length.
        hidden = self.encoder(ids, attention_mask=None if bool(keep.all()) else keep.long()).last_hidden_state
        keep = keep[..., None].to(hidden.dtype)
        return (hidden * keep).sum(1) / keep.sum(1)

    def hidden(self, ids, slots=None, slot_at=None):
        """Decoder's last hidden state [B, T, d_dec] for ids [B, T]; slots [N, d_dec] replace the embeddings at the flat positions
        slot_at [N]. Rows are padded on the right, which a causal decoder never sees, so no mask is needed."""
        x = self.decoder.model.embed_tokens(ids)
        if slots is not None and len(slots):
            x = x.flatten(0, 1).index_put((slot_at,), slots.to(x.dtype)).view(*ids.shape, -1)
        return self.decoder.model(inputs_embeds=x, use_cache=False).last_hidden_state

    def token_losses(self, hidden, labels):
        """Negative log-likelihood in nats of every target, flat, in row order; labels [B, T], IGNORE where there is none.
        labels[b, t] is the token that follows position t."""
        at = labels != IGNORE
        logits = self.decoder.lm_head(hidden[at]).float()
        return F.cross_entropy(logits, labels[at], reduction="none")

    def loss(self, hidden, labels, weight=None):
        """(weighted mean over all targets, every target's loss as in `token_losses`, detached); for training."""
        at = labels != IGNORE
        weight = torch.ones(int(at.sum())) if weight is None else weight
        return VocabularyLoss.apply(hidden[at], self.decoder.lm_head.weight, labels[at], weight / weight.sum())


class MixedBatch:
    """Rows of token ids and chunk slots, built piece by piece, then padded.

    add_row takes pieces ("tokens", ids), ("target", ids) or ("slot", index into `chunks`); only "target" ids are learnt."""

    def __init__(self):
        self.chunks, self.rows = [], []

    def chunk(self, ids):
        self.chunks.append(list(ids))
        return len(self.chunks) - 1

    def add_row(self, pieces):
        ids, slots, learnt = [], [], []
        for kind, value in pieces:
            if kind == "slot":
                slots.append((len(ids), value))
                ids.append(PAD)
                learnt.append(False)
            else:
                ids.extend(int(v) for v in value)
                learnt.extend([kind == "target"] * len(value))
        self.rows.append((ids, slots, learnt))

    def tensors(self):
        """(ids [B, T], labels [B, T], slot_at [N'], chunk_of [N']): slot i takes the projected chunk chunk_of[i]."""
        width = max(len(ids) for ids, _, _ in self.rows)
        ids = torch.full((len(self.rows), width), PAD)
        labels = torch.full((len(self.rows), width), IGNORE)
        slot_at, chunk_of = [], []
        for b, (row, slots, learnt) in enumerate(self.rows):
            row = torch.tensor(row)
            ids[b, : len(row)] = row
            labels[b, : len(row) - 1] = torch.where(torch.tensor(learnt[1:]), row[1:], IGNORE)
            slot_at += [b * width + t for t, _ in slots]
            chunk_of += [c for _, c in slots]
        return ids, labels, torch.tensor(slot_at, dtype=torch.long), torch.tensor(chunk_of, dtype=torch.long)

    def hidden(self, model):
        """(hidden states [B, T, d_dec], labels [B, T])"""
        ids, labels, slot_at, chunk_of = self.tensors()
        slots = model.projector(model.encode(self.chunks))[chunk_of] if len(slot_at) else None
        return model.hidden(ids, slots, slot_at), labels

    def losses(self, model):
        """Token losses (flat) of the batch under the model, and how many targets each row has."""
        hidden, labels = self.hidden(model)
        return model.token_losses(hidden, labels), (labels != IGNORE).sum(1)

    def loss(self, model):
        """Mean loss of all targets, for training."""
        return model.loss(*self.hidden(model))[0]


def n_expand(p, n_chunks):
    """How many chunks are expanded, as the runtime decides it (src/refrag/select.cpp)."""
    if p == 0:
        return 0
    return n_chunks if p == 1 else min(n_chunks, max(1, math.floor(p * n_chunks + 0.5)))
