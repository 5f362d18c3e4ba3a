"""The lean decoder: a frozen LLaMA that exists already, with LoRA on every linear, written for training on few CPU cores.

It computes what `transformers` and `peft` compute (test_smol.py), in few and large operations:
* The adapter is merged once a step, W' = (W + s B A) diag(w), w being the norm's weight before it. Forward is then the plain product with W'; the
  gradients of A and B come from the product's input and output gradient, so they cost four narrow products and no copy of dW.
* q, k and v are one product, gate and up another. Rows of all sequences are flattened to [M, dim].
* Rows of q and k stay interleaved as GGUF has them: a rotation is one complex product. Adapters are put into Hugging Face order on export.
* Only the rows that have a target meet the head.

Shapes: M = B * T rows; H query heads and Hkv key heads of d numbers; r the adapter's rank.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from weights_tools.gguf import unpermuted

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
        gradients = ctx.merged.gradients(hat, dy)
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
        return dy @ ctx.merged.w, None, *ctx.merged.gradients(x, dy)


class GatedLinear(torch.autograd.Function):
    """y = (silu(g) * u) @ w.T; gu [M, 2 K] holds g, then u. The product's input is made again backward."""

    @staticmethod
    def forward(ctx, gu, merged, *parameters):
        ctx.merged = merged
        ctx.save_for_backward(gu)
        g, u = gu.chunk(2, 1)
        return F.silu(g).mul_(u) @ merged.w.T

    @staticmethod
    def backward(ctx, dy):
        (gu,) = ctx.saved_tensors
        g, u = gu.chunk(2, 1)
        s, dh = F.silu(g), dy @ ctx.merged.w
        gradients = ctx.merged.gradients(s * u, dy)
        out = torch.empty_like(gu)
        torch.mul(dh, s, out=out[:, s.shape[1] :])
        out[:, : s.shape[1]] = torch.ops.aten.silu_backward(dh.mul_(u), g)
        return out, None, *gradients


class Rotate(torch.autograd.Function):
    """Rotates the first n heads of x [B, T, heads, d] by turns, complex [B or 1, T, 1, d / 2]; the others stay."""

    @staticmethod
    def apply_to(x, turns, n):
        out = torch.empty_like(x)
        pairs = torch.view_as_complex(x[:, :, :n].float().unflatten(-1, (-1, 2)))
        out[:, :, :n] = torch.view_as_real(pairs * turns).flatten(-2)
        out[:, :, n:] = x[:, :, n:]
        return out

    @staticmethod
    def forward(ctx, x, turns, n):
        ctx.turns, ctx.n = turns, n
        return Rotate.apply_to(x, turns, n)

    @staticmethod
    def backward(ctx, dy):
        return Rotate.apply_to(dy, ctx.turns.conj().resolve_conj(), ctx.n), None, None


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
        self.products, self.adapters = [], nn.ModuleList()
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

    def parts(self, layer, group):
        return [(self.adapters[layer][f"{n}_A"], self.adapters[layer][f"{n}_B"]) for n in GROUPS[group]] if self.rank else []

    @torch.no_grad()
    def merge(self):
        """To be called after every change of the adapter."""
        for i, products in enumerate(self.products if self.rank else []):
            for group, product in products.items():
                product.merge(self.parts(i, group), self.scale)

    @torch.no_grad()
    def unmerge(self):
        """The untouched base until the next `merge`."""
        for products in self.products:
            for product in products.values():
                product.w, product.parts = product.base, []

    def hidden(self, x, positions=None, mask=None, cache=None):
        """Last hidden states, without the last norm's weight, which is in `head`. x [B, T, dim] embeddings; positions [B, T] (0 .. T - 1 when absent); mask
        bool [B, 1, T, T], true where a row may look (causal when absent). cache: a list that takes every layer's (k, v)."""
        b, t, dim = x.shape
        turns = self.turns[:t][None, :, None] if positions is None else self.turns[positions][:, :, None]
        x = x.to(self.dtype).reshape(b * t, dim)
        eps, nq, nk = self.config["rms_norm_eps"], self.n_heads, self.n_kv
        for i, p in enumerate(self.products):
            flat = {g: [q for pair in self.parts(i, g) for q in pair] if m.parts else [] for g, m in p.items()}
            qkv = NormLinear.apply(x, eps, p["qkv"], *flat["qkv"]).view(b, t, nq + 2 * nk, self.d)
            qkv = Rotate.apply(qkv, turns, nq + nk).transpose(1, 2)
            q, k, v = qkv.split((nq, nk, nk), 1)
            if cache is not None:
                k, v = cache.put(i, k, v)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and t > 1, enable_gqa=True)
            x = x + Linear.apply(a.transpose(1, 2).reshape(b * t, nq * self.d), p["o"], *flat["o"])
            gu = NormLinear.apply(x, eps, p["gate_up"], *flat["gate_up"])
            x = x + GatedLinear.apply(gu, p["down"], *flat["down"])
        r = x.float().square().mean(1, keepdim=True).add(eps).rsqrt()
        return (x * r.to(x.dtype)).view(b, t, dim)

    def embeddings(self, ids):
        return self.embed[ids]

    def logits(self, hidden):
        return hidden @ self.head.T

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


class Cache:
    """Keys and values of the positions before, for generation."""

    def __init__(self, n_layers):
        self.kept = [None] * n_layers

    def put(self, layer, k, v):
        if self.kept[layer] is not None:
            k, v = torch.cat([self.kept[layer][0], k], 2), torch.cat([self.kept[layer][1], v], 2)
        self.kept[layer] = k, v
        return k, v
