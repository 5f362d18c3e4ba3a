"""The lean decoder: a frozen LLaMA that exists already, with LoRA on every linear, written for training on few CPU cores.

It computes what `transformers` and `peft` compute (test_smol.py), in few and large operations:
* The adapter is merged once a step, W' = (W + s B A) diag(w), w being the norm's weight before it. Forward is then the plain product with W'; the
  gradients of A and B come from the product's input and output gradient, so they cost four narrow products and no copy of dW.
* q, k and v are one product, gate and up another. Positions of all rows are packed to [M, dim]; attention alone takes them apart.
* Rows of q and k stay interleaved as GGUF has them: a rotation is one complex product. Adapters are put into Hugging Face order on export.
* Only the rows that have a target meet the head.

Shapes: B rows of at most W positions, M in all; nq query heads and nk key heads of d numbers; r the adapter's rank.
"""
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from weights_tools.gguf import unpermuted

from ..model import VocabularyLoss

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
PLACE = {name: ("self_attn" if name[0] in "qkvo" else "mlp") for name in LINEARS}


def interleaved(weight, n_heads):
    """Rows of q or k in Hugging Face order [.., columns] -> the halves of each head interleaved; the way back of `unpermuted`."""
    rows = weight.shape[0]
    return weight.reshape(n_heads, 2, rows // n_heads // 2, -1).transpose(1, 2).reshape(rows, -1)


class Merged:
    """One product's effective weight w [N, K] and what its gradients need: the parts' A and B, their rows, the scale, the norm's weight."""

    def __init__(self, base, norm):
        self.base = base if norm is None else base * norm  # [N, K]
        self.norm, self.w, self.parts, self.scale, self.a = norm, self.base, [], 0.0, None

    def merge(self, parts, scale):
        """parts: [(A [r, K], B [n, r])] whose rows follow each other"""
        self.parts, self.scale = parts, scale
        a = torch.cat([a.detach() for a, _ in parts])
        self.a = a if self.norm is None else a * self.norm  # [P r, K]
        self.w, at, begin = torch.empty_like(self.base), 0, 0
        for a, b in parts:
            n, r = b.shape
            inner = self.a[begin : begin + r].to(self.base.dtype)
            torch.addmm(self.base[at : at + n], b.detach().to(self.base.dtype), inner, alpha=scale, out=self.w[at : at + n])
            at, begin = at + n, begin + r
        self.a = self.a.to(self.base.dtype)

    def gradients(self, x, dy):
        """x [M, K], dy [M, N] -> [dA, dB, dA, dB, ...] in fp32"""
        if not self.parts:
            return []
        inner, out, at, begin = x @ self.a.T, [], 0, 0
        outer, db = [], []
        for a, b in self.parts:
            n, r = b.shape
            part = dy[:, at : at + n]
            outer.append(part @ b.detach().to(dy.dtype))
            db.append((part.T @ inner[:, begin : begin + r]).float() * self.scale)
            at, begin = at + n, begin + r
        da = (torch.cat(outer, 1).T @ x).float() * self.scale
        if self.norm is not None:
            da = da * self.norm
        begin = 0
        for (a, b), d in zip(self.parts, db):
            out += [da[begin : begin + b.shape[1]], d]
            begin += b.shape[1]
        return out


class NormLinear(torch.autograd.Function):
    """y = rms_norm(x) @ w.T, the norm's weight being in w. x [M, K]"""

    @staticmethod
    def forward(ctx, x, eps, merged, *parameters):
        r = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.merged = merged
        ctx.save_for_backward(x, r)
        return (x * r) @ merged.w.T

    @staticmethod
    def backward(ctx, dy):
        x, r = ctx.saved_tensors
        hat, dh = x * r, dy @ ctx.merged.w
        gradients = ctx.merged.gradients(hat, dy) if len(ctx.needs_input_grad) > 3 else ()
        share = torch.linalg.vecdot(dh, hat)[:, None].div_(x.shape[1])
        dx = dh.addcmul_(hat, share, value=-1).mul_(r)
        return dx, None, None, *gradients


class Linear(torch.autograd.Function):
    """y = x @ w.T; x [M, K]"""

    @staticmethod
    def forward(ctx, x, merged, *parameters):
        ctx.merged = merged
        ctx.save_for_backward(x)
        return x @ merged.w.T

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy @ ctx.merged.w, None, *(ctx.merged.gradients(x, dy) if len(ctx.needs_input_grad) > 2 else ())


class GatedLinear(torch.autograd.Function):
    """y = (silu(g) * u) @ w.T; gu [M, 2 K] holds g, then u"""

    @staticmethod
    def forward(ctx, gu, merged, *parameters):
        g, u = gu.chunk(2, 1)
        s = F.silu(g)
        h = s * u
        ctx.merged = merged
        ctx.save_for_backward(gu, s, h)
        return h @ merged.w.T

    @staticmethod
    def backward(ctx, dy):
        gu, s, h = ctx.saved_tensors
        g, u = gu.chunk(2, 1)
        dh = dy @ ctx.merged.w
        gradients = ctx.merged.gradients(h, dy) if len(ctx.needs_input_grad) > 2 else ()
        out = torch.empty_like(gu)
        torch.mul(dh, s, out=out[:, s.shape[1] :])
        torch.ops.aten.silu_backward.grad_input(dh.mul_(u), g, grad_input=out[:, : s.shape[1]])
        return out, None, *gradients


class Group:
    """Rows of about one length, padded to the longest for attention, which goes through their queries in blocks, each with the keys that come
    before the block's end: what lies beyond the diagonal costs little."""

    def __init__(self, rows, begins, lengths, masks, dtype, block):
        """rows: their numbers, of which begins, lengths and masks are"""
        self.b, self.w = len(rows), max(lengths[i] for i in rows)
        n = torch.tensor([lengths[i] for i in rows])
        at = torch.arange(self.w)
        kept = at < n[:, None]
        places = torch.tensor([begins[i] for i in rows])[:, None] + at
        self.places = places[kept]  # [rows' positions] the packed places
        self.taken = torch.where(kept, places, places[:, :1]).flatten()  # [B W]; padding repeats a row's first
        self.back = None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1)
        self.blocks = []  # first query, end, first key that has a mask, mask [B, 1, end - first, end - first masked] to be added or None
        mask = None
        if any(masks[i] is not None for i in rows):
            mask = torch.eye(self.w, dtype=torch.bool).repeat(self.b, 1, 1)  # padding looks at itself
            for j, i in enumerate(rows):
                m = lengths[i]
                mask[j, :m, :m] = torch.ones(m, m, dtype=torch.bool).tril() if masks[i] is None else masks[i]
        for first in range(0, self.w, block):
            end = min(first + block, self.w)
            if mask is None:
                free, seen = first, torch.ones(end - first, end - first, dtype=torch.bool).tril()[None]
            else:
                seen = mask[:, first:end, :end]
                all_see = seen.flatten(0, 1).all(0)
                free = end if bool(all_see.all()) else int(all_see.int().argmin())
                seen = seen[:, :, free:]
            added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None]
            self.blocks.append((first, end, free, added if free < end else None))

    def padded(self, x):
        """Packed x [M, ...] -> [B, W, ...]"""
        return x.index_select(0, self.taken).unflatten(0, (self.b, self.w))

    def put(self, out, x):
        """Into the packed `out` [M, ...] what is these rows' of x [B, W, ...]."""
        x = x.flatten(0, 1)
        out.index_copy_(0, self.places, x if self.back is None else x.index_select(0, self.back))


class Rows:
    """Rows of a batch, packed: their positions follow each other without padding, [M]. Only attention takes them apart, in groups of like length.

    lengths: of each row; positions [M]: 0 .. length - 1 of each row when absent; masks: of each row None, causal, or bool [length, length], true
    where a position (first) may look at another (second), none of which is later."""

    def __init__(self, lengths, dtype, positions=None, masks=None, block=128):
        lengths = list(lengths)
        begins = [0, *np.cumsum(lengths)[:-1].tolist()]
        self.m, self.groups, at = sum(lengths), [], 0
        self.positions = torch.cat([torch.arange(n) for n in lengths]) if positions is None else positions
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        masks = masks or [None] * len(lengths)
        while at < len(order):
            end = at + 1
            while end < len(order) and lengths[order[end]] >= 0.75 * lengths[order[at]] - 4:
                end += 1
            self.groups.append(Group(order[at:end], begins, lengths, masks, dtype, block))
            at = end


def rotated(x, turns):
    """x [..., heads, d] in fp32, turns complex [.., d / 2] -> the same shape"""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class Attention(torch.autograd.Function):
    """qkv [M, (nq + 2 nk) d] before rotation -> [M, nq d]. turns: of each group, complex [B, 1, W, d / 2]. The query heads of a key head are taken
    together, as rows of one product."""

    @staticmethod
    def heads(qkv, group, turns, nq, nk):
        """q [B nk, nq / nk, W, d], scaled, k and v [B nk, W, d]"""
        b, w, d = group.b, group.w, 2 * turns.shape[-1]
        x = group.padded(qkv).view(b, w, nq + 2 * nk, d).transpose(1, 2)
        qk = torch.empty(b, nq + nk, w, d, dtype=qkv.dtype)
        qk.copy_(rotated(x[:, : nq + nk].float(), turns))
        q, k = qk.split((nq, nk), 1)
        q = (q * d**-0.5).view(b * nk, nq // nk, w, d)
        return q, k.reshape(b * nk, w, d), x[:, nq + nk :].reshape(b * nk, w, d)

    @staticmethod
    def forward(ctx, qkv, rows, turns, nq, nk):
        out, saved, shares = qkv.new_empty(rows.m, nq * qkv.shape[1] // (nq + 2 * nk)), [], []
        for group, turn in zip(rows.groups, turns):
            q, k, v = Attention.heads(qkv, group, turn, nq, nk)
            n, g, w, d = q.shape
            mixed, kept = torch.empty_like(q), []
            for first, end, free, mask in group.blocks:
                s = q[:, :, first:end].reshape(n, -1, d) @ k[:, :end].transpose(1, 2)
                if mask is not None:
                    s.view(group.b, nq, end - first, end)[..., free:].add_(mask)
                share = s.softmax(-1)
                mixed[:, :, first:end] = (share @ v[:, :end]).view(n, g, end - first, d)
                kept.append(share)
            group.put(out, mixed.view(group.b, nq, w, d).transpose(1, 2).flatten(2))
            saved += [q, k, v]
            shares.append(kept)
        ctx.rows, ctx.turns, ctx.heads, ctx.shares = rows, turns, (nq, nk), shares
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx, dy):
        rows, (nq, nk), saved = ctx.rows, ctx.heads, ctx.saved_tensors
        out = dy.new_empty(rows.m, dy.shape[1] // nq * (nq + 2 * nk))
        for i, (group, turn, kept) in enumerate(zip(rows.groups, ctx.turns, ctx.shares)):
            q, k, v = saved[3 * i : 3 * i + 3]
            b, (n, g, w, d) = group.b, q.shape
            dmixed = group.padded(dy)
            if group.back is not None:  # what padding repeats is nobody's
                dmixed = dmixed.flatten(0, 1)
                dmixed = torch.zeros_like(dmixed).index_copy_(0, group.back, dmixed.index_select(0, group.back))
            dmixed = dmixed.view(b, w, nq, d).transpose(1, 2).reshape(n, g, w, d)
            dqkv = torch.empty(b, nq + 2 * nk, w, d)
            dq = dqkv[:, :nq].view(b, nk, g, w, d)
            dk, dv = torch.zeros(n, w, d), torch.zeros(n, w, d)
            for (first, end, _, _), share in zip(group.blocks, kept):
                part = dmixed[:, :, first:end].reshape(n, -1, d)
                ds = torch._softmax_backward_data(part @ v[:, :end].transpose(1, 2), share, -1, share.dtype)
                dq[:, :, :, first:end] = (ds @ k[:, :end]).view(b, nk, g, end - first, d)
                dk[:, :end] += ds.transpose(1, 2) @ q[:, :, first:end].reshape(n, -1, d)
                dv[:, :end] += share.transpose(1, 2) @ part
            dqkv[:, :nq] *= d**-0.5
            dqkv[:, nq : nq + nk], dqkv[:, nq + nk :] = dk.view(b, nk, w, d), dv.view(b, nk, w, d)
            dqkv[:, : nq + nk] = rotated(dqkv[:, : nq + nk], turn.conj())
            group.put(out, torch.empty(b, w, nq + 2 * nk, d, dtype=dy.dtype).copy_(dqkv.transpose(1, 2)).flatten(2))
        ctx.shares = None
        return out, None, None, None, None


class LeanDecoder(nn.Module):
    """config: config.json of a LLaMA with tied embeddings; weights: {Hugging Face name: array or tensor}; rank 0: no adapter."""

    def __init__(self, config, weights, rank=16, scale=2.0, dtype=torch.float32):
        super().__init__()
        c = self.config = config
        assert c["tie_word_embeddings"] and c["model_type"] == "llama" and not c.get("rope_scaling"), "expected a LLaMA with tied embeddings and plain RoPE"
        self.rank, self.scale, self.dtype = rank, scale, dtype
        self.n_heads, self.n_kv, self.d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        w = {name: torch.as_tensor(np.asarray(value)) if not torch.is_tensor(value) else value for name, value in dict(weights).items()}
        self.register_buffer("embed", w["model.embed_tokens.weight"].to(dtype), persistent=False)
        self.norm = w["model.norm.weight"].to(dtype)
        self.head = self.embed * self.norm  # the last norm's weight is in it
        frequencies = c["rope_theta"] ** (-torch.arange(0, self.d, 2).double() / self.d)
        angles = torch.arange(c["max_position_embeddings"]).double()[:, None] * frequencies
        self.turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        self.products, self.adapters, self.merged_versions = [], nn.ModuleList(), None
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            raw = {name: w[f"{at}{PLACE[name]}.{name}.weight"].to(dtype) for name in LINEARS}
            raw["q_proj"], raw["k_proj"] = interleaved(raw["q_proj"], self.n_heads), interleaved(raw["k_proj"], self.n_kv)
            norms = {"qkv": w[f"{at}input_layernorm.weight"].to(dtype), "gate_up": w[f"{at}post_attention_layernorm.weight"].to(dtype)}
            self.products.append({g: Merged(torch.cat([raw[n] for n in names]), norms.get(g)) for g, names in GROUPS.items()})
            if rank:
                adapter = nn.ParameterDict()
                for name in LINEARS:
                    a = nn.Parameter(torch.empty(rank, raw[name].shape[1]))
                    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                    adapter[f"{name}_A"], adapter[f"{name}_B"] = a, nn.Parameter(torch.zeros(raw[name].shape[0], rank))
                self.adapters.append(adapter)
        self.merge()

    def parts(self, layer, group):
        return [(self.adapters[layer][f"{n}_A"], self.adapters[layer][f"{n}_B"]) for n in GROUPS[group]] if self.rank else []

    @torch.no_grad()
    def merge(self):
        """To be called after every change of the adapter; costs nothing where one that does not learn was merged before."""
        versions = [p._version for p in self.adapters.parameters()]  # a fused optimizer does not count its changes
        if not versions or versions == self.merged_versions and not any(p.requires_grad for p in self.adapters.parameters()):
            return
        self.merged_versions = versions
        for i, products in enumerate(self.products):
            for group, product in products.items():
                product.merge(self.parts(i, group), self.scale)

    @torch.no_grad()
    def unmerge(self):
        """The untouched base until the next `merge`."""
        self.merged_versions = None
        for products in self.products:
            for product in products.values():
                product.w, product.parts = product.base, []

    def hidden(self, x, rows):
        """Last hidden states [M, dim], without the last norm's weight, which is in `head`. x [M, dim]: embeddings, packed as `rows` says."""
        eps, nq, nk = self.config["rms_norm_eps"], self.n_heads, self.n_kv
        turns = [group.padded(self.turns[rows.positions])[:, None] for group in rows.groups]
        x, learns = x.to(self.dtype), torch.is_grad_enabled() and any(q.requires_grad for q in self.adapters.parameters())
        for i, p in enumerate(self.products):
            flat = {g: [q for pair in self.parts(i, g) for q in pair] if m.parts and learns else [] for g, m in p.items()}
            qkv = NormLinear.apply(x, eps, p["qkv"], *flat["qkv"])
            x = x + Linear.apply(Attention.apply(qkv, rows, turns, nq, nk), p["o"], *flat["o"])
            gu = NormLinear.apply(x, eps, p["gate_up"], *flat["gate_up"])
            x = x + GatedLinear.apply(gu, p["down"], *flat["down"])
        r = x.float().square().mean(1, keepdim=True).add(eps).rsqrt()
        return x * r.to(x.dtype)

    def embeddings(self, ids):
        return self.embed[ids]

    def logits(self, hidden):
        return hidden @ self.head.T

    def loss(self, hidden, targets, share, *teaching):
        """VocabularyLoss (../model.py) of hidden states [N, dim]: (sum of share * nll, nll [N] without gradient)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return VocabularyLoss.apply(hidden, self.head, targets, share, *teaching)

    @torch.no_grad()
    def frozen(self):
        """A decoder without adapter that stays what this one is now; embeddings are shared."""
        self.merge()
        out = copy.copy(self)
        out._modules, out.rank, out.products, out.adapters = {}, 0, [], nn.ModuleList()
        for products in self.products:
            out.products.append({group: copy.copy(product) for group, product in products.items()})
            for product in out.products[-1].values():
                product.base, product.parts = product.w, []  # `merge` makes new ones
        return out

    def exported(self):
        """{name in a PEFT adapter: fp32 tensor}"""
        out = {}
        for i, adapter in enumerate(self.adapters):
            for name in LINEARS:
                b = adapter[f"{name}_B"].detach()
                if name in ("q_proj", "k_proj"):
                    b = torch.from_numpy(unpermuted(b.numpy(), self.n_heads if name == "q_proj" else self.n_kv))
                at = f"base_model.model.model.layers.{i}.{PLACE[name]}.{name}"
                out[f"{at}.lora_A.weight"], out[f"{at}.lora_B.weight"] = adapter[f"{name}_A"].detach().clone(), b.clone()
        return out

    @torch.no_grad()
    def take(self, exported):
        """The adapter from what `exported` gives."""
        for i, adapter in enumerate(self.adapters):
            for name in LINEARS:
                at = f"base_model.model.model.layers.{i}.{PLACE[name]}.{name}"
                b = exported[f"{at}.lora_B.weight"].float()
                if name in ("q_proj", "k_proj"):
                    b = interleaved(b, self.n_heads if name == "q_proj" else self.n_kv)
                adapter[f"{name}_A"].copy_(exported[f"{at}.lora_A.weight"])
                adapter[f"{name}_B"].copy_(b)
        self.merge()
