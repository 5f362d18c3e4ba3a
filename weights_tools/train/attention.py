"""Attention of the default model's networks on a CPU, registered with `transformers` as "short-rows".

PyTorch's own CPU kernel computes bf16 gradients block by block through tiny matrix products, whose overhead makes rows of 16
positions eight times slower than products of whole rows; those in turn leave the cache for long rows. So rows up to SHORT positions
take whole products, longer ones and GPUs `scaled_dot_product_attention`.
"""
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHORT = 384
NAME = "short-rows"


def short_rows(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **more):
    """q [B, H, T, D], k and v [B, Hkv, T, D] -> ([B, T, H, D], None), as the attention functions of `transformers`."""
    b, h, t, d = q.shape
    if t > SHORT or q.is_cuda or dropout:
        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, dropout=dropout, **more)
    n_kv = k.shape[1]
    scores = q.reshape(b, n_kv, h // n_kv * t, d) @ k.transpose(2, 3)
    scores = scores.view(b, n_kv, h // n_kv, t, t).float() * scaling
    if attention_mask is not None:  # bool [B, 1, T, T]
        scores = scores.masked_fill(~attention_mask[:, :, None], float("-inf"))
    elif getattr(module, "is_causal", True):
        at = torch.arange(t, device=q.device)
        scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
    share = scores.softmax(-1).to(v.dtype).view(b, n_kv, h // n_kv * t, t)
    return (share @ v).view(b, h, t, d).transpose(1, 2), None


class RotaryTable(nn.Module):
    """cos and sin of all positions, made once. Compiled code fuses the functions into every layer's rotation, and then computes them
    for each element of each head."""

    def __init__(self, rotary, n_positions):
        super().__init__()
        cos, sin = rotary(torch.zeros(1), torch.arange(n_positions)[None])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, position_ids):
        """position_ids [1, T] are 0 .. T - 1, as in every row of training; returns [1, T, head_dim] twice."""
        t = position_ids.shape[1]
        assert t <= self.cos.shape[1], "a row is longer than [decoder] max_position_embeddings"
        return self.cos[:, :t].to(x.dtype), self.sin[:, :t].to(x.dtype)


AttentionInterface.register(NAME, short_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)
