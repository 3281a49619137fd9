"""The GPT that is measured with a linear each for q, k and v, as Llama-type models have them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshare.embedded.model import GPT, CausalSelfAttention

PARTS = ("q_proj", "k_proj", "v_proj")


class SeparateAttention(nn.Module):
    """Causal attention with the rows of ``c_attn`` in three linears."""

    def __init__(self, fused: CausalSelfAttention) -> None:
        super().__init__()
        self.n_head = fused.n_head
        weights = fused.c_attn.weight.detach().chunk(len(PARTS))
        for at, name in enumerate(PARTS):
            linear = nn.Linear(fused.n_embd, fused.n_embd, device="meta")
            linear.weight = nn.Parameter(weights[at].clone())
            linear.bias = nn.Parameter(torch.zeros(fused.n_embd))
            setattr(self, name, linear)
        self.c_proj = fused.c_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, D) to (B, T, D)."""
        b, t, d = x.size()
        heads = (b, t, self.n_head, d // self.n_head)
        q, k, v = (getattr(self, name)(x).view(heads).transpose(1, 2) for name in PARTS)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(b, t, d))
        return out


def separated(model: GPT) -> GPT:
    """The model, each of its blocks with three linears; its other weights stay."""
    for block in cast(nn.ModuleList, model.transformer["h"]):
        block.attn = SeparateAttention(cast(CausalSelfAttention, block.attn))
    return model.eval()
