"""The four networks of a refrag model in PyTorch, and the mixed input that joins them (paper, section 2).

LLaMA and RoBERTa are the modules of `transformers`, so weights are saved under their own names; projector and policy are
ours, named as in `projector.safetensors` and `policy.safetensors`. Not an inference engine: there is no KV cache here.
Shapes: B rows of the batch, T positions, N chunks, d_dec and d_enc the two widths, L sensed chunks of a row.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from .attention import NAME as SHORT_ROWS
from .attention import RotaryTable

BOS, PAD, EOS = 0, 1, 2  # of the encoder, and of a decoder that shares its vocabulary
IGNORE = -100  # label of a position without a target


class Chunk(list):
    """A chunk's decoder ids; `encoder` holds its ids in the encoder's vocabulary where that is another one."""

    encoder = None


def chunked(ids, k):
    """ids cut into pieces of k, the last one shorter: chunks where both sides share a vocabulary."""
    return [Chunk(ids[i : i + k]) for i in range(0, len(ids), k)]


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
        n, dim, device = c.shape[1], self.in_proj.out_features, c.device
        angle = torch.arange(n, device=device)[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
        pe = torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(n, dim)
        x = self.in_proj(c) + pe
        if hasattr(self, "question_type"):
            x = x + is_question[..., None] * self.question_type
        for layer in self.layers:
            x = layer(x, keep)
        return self.head(self.norm(x)).squeeze(-1).float()


def softmax_gradient(logits, targets, share, taught=None, teacher=None):
    """(nll [M], gradient of sum(share * nll) with respect to the logits [M, V], in their dtype). With teacher logits [M, V] the
    gradient is that of the cross-entropy against (1 - taught) * target + taught * softmax(teacher), taught [M] in 0 .. 1."""
    wide = logits.float()
    total = wide.logsumexp(1, keepdim=True)
    nll = (total - wide.gather(1, targets[:, None])).squeeze(1)
    wanted = (torch.arange(logits.shape[1], device=logits.device) == targets[:, None]).float()
    if teacher is not None:
        wanted = (1 - taught[:, None]) * wanted + taught[:, None] * teacher.float().softmax(1)
    return nll, (((wide - total).exp() - wanted) * share[:, None]).to(logits.dtype)


class VocabularyLoss(torch.autograd.Function):
    """Cross-entropy straight from hidden states, some rows at a time, gradients included.

    Logits of all rows at once would be the largest tensor of a step, written and read a dozen times; piece by piece they stay in
    the cache. hidden [M, d], weight [V, d], targets [M], share [M] -> (sum of share * nll, nll [M] without gradient). Products in
    autocast's dtype, the rest in fp32. taught [M] and teacher [M, d], hidden states, change the gradient as in `softmax_gradient`, not
    the value."""

    gradient = staticmethod(softmax_gradient)  # Refrag.fuse puts a fused one here

    @staticmethod
    def forward(ctx, hidden, weight, targets, share, taught=None, teacher=None):
        piece = 16384 if hidden.is_cuda else 1024
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        w, h = weight.to(dtype), hidden.to(dtype)
        nll, dh = [], torch.empty_like(h)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(targets), piece):
            at = slice(begin, begin + piece)
            more = () if teacher is None else (taught[at], teacher[at].to(dtype) @ w.T)
            piece_nll, grad = VocabularyLoss.gradient(h[at] @ w.T, targets[at], share[at], *more)
            nll.append(piece_nll)
            dh[at] = grad @ w
            if dw is not None:
                dw += grad.T @ h[at]
        nll = torch.cat(nll)
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(nll)
        return (nll * share).sum(), nll

    @staticmethod
    def backward(ctx, upstream, _):
        dh, dw = ctx.saved_tensors
        return dh * upstream, None if dw is None else dw * upstream, None, None, None, None


def regularise(decoder, share):
    """Dropout of what every attention and feed-forward block adds to the residual stream, which LLaMA itself has not."""
    for layer in decoder.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, _, out: (F.dropout(out[0], share, module.training), *out[1:]))
        layer.mlp.register_forward_hook(lambda module, _, out: F.dropout(out, share, module.training))


class Refrag(nn.Module):
    def __init__(self, cfg, decoder=None, encoder=None):
        """cfg: the [decoder], [encoder], [policy] tables of a configuration file; the two networks are made from them unless they
        are given (pretrained.py)."""
        super().__init__()
        self.cfg = cfg
        d, e, p = cfg["decoder"], cfg["encoder"], cfg["policy"]
        self.decoder = decoder or LlamaForCausalLM(
            LlamaConfig(**d, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, attn_implementation=SHORT_ROWS))
        if not decoder:
            self.decoder.model.rotary_emb = RotaryTable(self.decoder.model.rotary_emb, d["max_position_embeddings"])
        self.encoder = encoder or RobertaModel(
            RobertaConfig(**e, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, attn_implementation=SHORT_ROWS,
                          hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            add_pooling_layer=False,
        )
        d_enc = self.encoder.config.hidden_size
        self.projector = Projector(d_enc, self.decoder.config.hidden_size)
        self.policy = Policy(d_enc, **p)
        self.bos, self.eos = self.decoder.config.bos_token_id, self.decoder.config.eos_token_id
        self.cut = chunked  # (ids of a segment, k) -> its chunks
        self.decode_body, self.encode_body = [self.decoder.model], [self.encoder]  # in lists: not submodules a second time
        if cfg.get("run", {}).get("dropout"):
            regularise(self.decoder, cfg["run"]["dropout"])

    def fuse(self, decoder=True, encoder=True, dynamic=None):
        """Compiles the networks, which fuses what lies between the matrix products; the first calls take minutes."""
        if decoder:
            self.decode_body = [torch.compile(self.decoder.model, dynamic=dynamic)]
        if encoder:
            self.encode_body = [torch.compile(self.encoder, dynamic=True)]
        VocabularyLoss.gradient = staticmethod(torch.compile(softmax_gradient, dynamic=True))

    def forward(self, function, *arguments):
        """Calls function(*arguments). Under FSDP a stage's loss must run inside a call of the module that holds everything (fsdp.py)."""
        return function(*arguments)

    def no_slots(self):
        """The slots of a batch without chunks: None; fsdp.py puts something else here."""
        return None

    @property
    def device(self):
        return self.projector.fc1.weight.device

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
        """chunks -> chunk_emb [N, d_enc]: the mean over <s> ids </s>."""
        rows = [c.encoder if getattr(c, "encoder", None) is not None else c for c in chunks]
        width = max(map(len, rows)) + 2
        ids = np.full((len(rows), width), PAD)
        ids[:, 0] = BOS
        for i, row in enumerate(rows):
            ids[i, 1 : len(row) + 1] = row
            ids[i, len(row) + 1] = EOS
        ids = torch.from_numpy(ids).to(self.device)
        keep = ids != PAD
        # Without a mask attention takes its fast path: chunks are nearly always of one length.
        hidden = self.encode_body[0](ids, attention_mask=None if bool(keep.all()) else keep.long()).last_hidden_state
        keep = keep[..., None].to(hidden.dtype)
        return (hidden * keep).sum(1) / keep.sum(1)

    def hidden(self, ids, slots=None, slot_at=None):
        """Decoder's last hidden state [B, T, d_dec] for ids [B, T]; slots [N, d_dec] replace the embeddings at the flat positions
        slot_at [N]. Rows are padded on the right, which a causal decoder never sees, so no mask is needed."""
        x = self.decoder.model.embed_tokens(ids)
        if slots is not None:
            x = x.flatten(0, 1).index_put((slot_at,), slots.to(x.dtype)).view(*ids.shape, -1)
        return self.decode_body[0](inputs_embeds=x, use_cache=False).last_hidden_state

    def token_losses(self, hidden, labels):
        """Negative log-likelihood in nats of every target, flat, in row order; labels [B, T], IGNORE where there is none.
        labels[b, t] is the token that follows position t."""
        at = labels != IGNORE
        logits = self.decoder.lm_head(hidden[at]).float()
        return F.cross_entropy(logits, labels[at], reduction="none")

    def loss(self, hidden, labels, weight=None, teaching=()):
        """(weighted mean over all targets, every target's loss as in `token_losses`, detached); for training. teaching: what
        `MixedBatch.teaching` returns."""
        at = labels != IGNORE
        if not at.any():  # a row of questions may be cut before its first answer
            return hidden.sum() * 0.0, hidden.new_empty(0)
        weight = torch.ones(int(at.sum()), device=labels.device) if weight is None else weight
        return VocabularyLoss.apply(hidden[at], self.decoder.lm_head.weight, labels[at], weight / weight.sum(), *teaching)

    def dense_loss(self, hidden, labels, weight):
        """`loss` for rows full of targets: (weighted mean over the targets, nll [B, T]); weight [B, T]."""
        share = torch.where(labels != IGNORE, weight, 0.0).flatten().float()
        loss, nll = VocabularyLoss.apply(hidden.flatten(0, 1), self.decoder.lm_head.weight, labels.clamp_min(0).flatten(), share / share.sum())
        return loss, nll.view_as(labels)


class MixedBatch:
    """Rows of token ids and chunk slots, built piece by piece, then padded.

    add_row takes pieces ("tokens", ids), ("target", ids) or ("slot", index into `chunks`); only "target" ids are learnt."""

    def __init__(self):
        self.chunks, self.rows, self.ready = [], [], None
        self.weights = None  # [M], of the targets in row order; without it all count alike
        self.lessons, self.taught = [], None
        self.imitated = None  # (k, [(chunks, question ids, holders)]): of the policy, beside (sft.py)

    def chunk(self, ids):
        self.chunks.append(ids)
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

    def teach(self, ids, n, weight):
        """The last row's last n targets are also taught by what the decoder itself says of the last n of `ids`, all of them tokens;
        weight: the teacher's part, 0 .. 1."""
        self.lessons.append((len(self.rows) - 1, ids, n, weight))

    def lesson_arrays(self, multiple):
        """(ids [L, T'], at [M], weight [M]): target m is taught by the hidden state at the flat position at[m], if weight[m] > 0."""
        ends = np.cumsum([sum(learnt[1:]) for _, _, learnt in self.rows])
        width = -(-max(len(ids) for _, ids, _, _ in self.lessons) // multiple) * multiple
        out = np.full((len(self.lessons), width), PAD)
        at, weight = np.zeros(ends[-1], dtype=np.int64), np.zeros(ends[-1], dtype=np.float32)
        for i, (row, ids, n, w) in enumerate(self.lessons):
            out[i, : len(ids)] = ids
            taught = slice(ends[row] - n, ends[row])
            at[taught] = i * width + np.arange(len(ids) - n - 1, len(ids) - 1)
            weight[taught] = w
        return out, at, weight

    def arrays(self, multiple=1):
        """(ids [B, T], labels [B, T], slot_at [N'], chunk_of [N']): slot i takes the projected chunk chunk_of[i]. T is padded to
        a multiple, so that compiled code meets few shapes."""
        width = -(-max(len(ids) for ids, _, _ in self.rows) // multiple) * multiple
        ids = np.full((len(self.rows), width), PAD)
        labels = np.full((len(self.rows), width), IGNORE)
        slot_at, chunk_of = [], []
        for b, (row, slots, learnt) in enumerate(self.rows):
            row = np.array(row)
            ids[b, : len(row)] = row
            labels[b, : len(row) - 1] = np.where(learnt[1:], row[1:], IGNORE)
            slot_at += [b * width + t for t, _ in slots]
            chunk_of += [c for _, c in slots]
        return ids, labels, np.array(slot_at, dtype=np.int64), np.array(chunk_of, dtype=np.int64)

    def finished(self, multiple=64):
        """The batch as it goes to a device, smaller and without its rows."""
        self.n_positions, self.ready = self.positions(), self.arrays(multiple)
        self.taught = self.lesson_arrays(multiple) if self.lessons else None
        self.rows = self.lessons = None
        return self

    def tensors(self, multiple=1):
        """`arrays` as tensors."""
        return tuple(torch.from_numpy(a) for a in self.ready or self.arrays(multiple))

    def hidden(self, model, multiple=1):
        """(hidden states [B, T, d_dec], labels [B, T])"""
        ids, labels, slot_at, chunk_of = (t.to(model.device) for t in self.tensors(multiple))
        slots = model.projector(model.encode(self.chunks))[chunk_of] if len(slot_at) else model.no_slots()
        return model.hidden(ids, slots, slot_at), labels

    def positions(self):
        """Decoder positions read, without padding."""
        return self.n_positions if self.ready else sum(len(ids) for ids, _, _ in self.rows)

    def losses(self, model):
        """Token losses (flat) of the batch under the model, and how many targets each row has."""
        hidden, labels = self.hidden(model)
        return model.token_losses(hidden, labels), (labels != IGNORE).sum(1)

    def teaching(self, model):
        """(weight [M], the teacher's hidden states [M, d_dec]) of a finished batch, or () where nothing is taught."""
        if self.taught is None:
            return ()
        ids, at, weight = (torch.from_numpy(a).to(model.device) for a in self.taught)
        with torch.no_grad():
            return weight, model.hidden(ids).flatten(0, 1)[at]

    def loss(self, model, multiple=64):
        """Weighted mean loss of all targets, for training."""
        weight = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32, device=model.device)
        return model.loss(*self.hidden(model, multiple), weight, self.teaching(model))[0]


def n_expand(p, n_chunks):
    """How many chunks are expanded, as the runtime decides it (src/refrag/select.cpp)."""
    if p == 0:
        return 0
    return n_chunks if p == 1 else min(n_chunks, max(1, math.floor(p * n_chunks + 0.5)))
