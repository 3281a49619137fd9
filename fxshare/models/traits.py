"""What a model's configuration and signature tell: heads, widths, vocabulary, context, example ids.

Architectures give the same number different names; each list has all that are known, in the order
in which they are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fxshare.models.source import Source

HEADS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "heads",
    "encoder_attention_heads",
)
DECODER_HEADS = ("decoder_attention_heads",)
KV_HEADS = ("num_key_value_heads", "n_kv_head", "num_kv_heads")
HEAD_WIDTHS = ("head_dim", "d_kv", "attention_head_size")
WIDTHS = ("hidden_size", "n_embd", "d_model")
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
# First arguments of forward that are token ids; example inputs can be made up for these only.
_IDS = ("input_ids", "idx", "ids", "tokens", "token_ids")


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of token ids that the model knows; None where nothing tells.

    Without a configuration it is the size of the largest embedding: perhaps too large, never too
    small.
    """
    size = number_of(model, ("vocab_size",))
    if size is not None:
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=None)


def context_of(model: nn.Module) -> int | None:
    """The most tokens that the model was made to read at once; None where nothing tells."""
    return number_of(model, _CONTEXTS)


def number_in(holder: object, names: Sequence[str]) -> int | None:
    """The first of ``names`` that is a positive whole number in a mapping, or of an object."""
    for name in names:
        value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def number_of(model: nn.Module, names: Sequence[str]) -> int | None:
    """:func:`number_in` of a model's configuration, or of its original's where it was compiled."""
    meta = getattr(model, "meta", None)
    source = meta.get("source") if isinstance(meta, dict) else None
    configs = [getattr(model, "config", None)]
    if isinstance(source, Source):
        configs.append(source.config)
    found = (number_in(config, names) for config in configs)
    return next((number for number in found if number is not None), None)


def example_ids(model: nn.Module, *, seed: int = 0) -> Tensor | None:
    """Random token ids (2, 16) to capture the model with; None unless it reads token ids."""
    first = next(iter(inspect.signature(model.forward).parameters), None)
    vocabulary = vocabulary_of(model)
    if first not in _IDS or vocabulary is None:
        return None
    length = min(16, context_of(model) or 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (2, length), generator=generator)


__all__ = [
    "DECODER_HEADS",
    "HEADS",
    "HEAD_WIDTHS",
    "KV_HEADS",
    "WIDTHS",
    "context_of",
    "example_ids",
    "number_in",
    "number_of",
    "vocabulary_of",
]
