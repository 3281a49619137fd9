"""``nn.MultiheadAttention`` written out, so that a graph shows the linears inside it.

Its own ``forward`` ends in one function that takes the weights as arguments; traced as it is, that
is one node, and nothing inside it can be rewritten.

Legend for shapes: B batch, L queries, S keys, E width, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def can_attend(module: nn.Module) -> bool:
    """Whether :func:`attend` computes what the module does. ``add_bias_kv`` and ``add_zero_attn``
    are rare and left to torch."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


def attend(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """What ``module(query, key, value, ...)`` returns, in operations of its own."""
    q, k, v = _projected(module, query, key, value)
    batched = query.ndim == 3
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    elif not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    # (B, H, L, D)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, q, batched, module.num_heads)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, p=module.dropout, training=module.training)
        y = weights @ v
    else:
        # torch takes the hint for the mask where there is no other mask
        causal = is_causal and key_padding_mask is None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else mask, dropout_p=dropout, is_causal=causal
        )
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        return y.squeeze(0), None if weights is None else weights.squeeze(0)
    # torch's lies in memory as (L, B, E), and that is the order in which a dropout draws its mask
    y = y.transpose(0, 1).contiguous()
    return y.transpose(0, 1) if module.batch_first else y, weights


def _projected(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> Any:
    e = module.embed_dim
    bias = module.in_proj_bias
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [
            F.linear(x, w, None if bias is None else bias[i * e : (i + 1) * e])
            for i, (x, w) in enumerate(zip((query, key, value), weights, strict=True))
        ]
    weight = module.in_proj_weight
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, dim=-1)

    def rows(x: Any, start: int, stop: int) -> Any:
        return F.linear(x, weight[start:stop], None if bias is None else bias[start:stop])

    if key is value:
        return rows(query, 0, e), *rows(key, e, 3 * e).chunk(2, dim=-1)
    return rows(query, 0, e), rows(key, e, 2 * e), rows(value, 2 * e, 3 * e)


def _mask(attn_mask: Any, padding: Any, q: Any, batched: bool, heads: int) -> Any:
    """One additive mask that broadcasts to ``(B, H, L, S)``; None where nothing is masked."""
    parts = []
    if attn_mask is not None:
        additive = _additive(attn_mask, q)
        # (L, S), or (B·H, L, S)
        parts.append(additive.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else additive)
    if padding is not None:
        additive = _additive(padding, q)
        parts.append(additive[:, None, None, :] if batched else additive[None, None, None, :])
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: Any, like: Any) -> Any:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
