"""What a model's configuration and signature tell: vocabulary, context, example ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxshare.models.source import Source

_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
# First arguments of forward that are token ids; example inputs can be made up for these only.
_IDS = ("input_ids", "idx", "ids", "tokens", "token_ids")


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of token ids that the model knows; None where nothing tells.

    Without a configuration it is the size of the largest embedding: perhaps too large, never too
    small.
    """
    size = _from_config(model, ("vocab_size",))
    if size is not None:
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=None)


def context_of(model: nn.Module) -> int | None:
    """The most tokens that the model was made to read at once; None where nothing tells."""
    return _from_config(model, _CONTEXTS)


def _from_config(model: nn.Module, names: tuple[str, ...]) -> int | None:
    meta = getattr(model, "meta", None)
    source = meta.get("source") if isinstance(meta, dict) else None
    configs = [getattr(model, "config", None)]
    if isinstance(source, Source):
        configs.append(source.config)
    for config in configs:
        for name in names:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def example_ids(model: nn.Module, *, seed: int = 0) -> Tensor | None:
    """Random token ids (2, 16) to capture the model with; None unless it reads token ids."""
    first = next(iter(inspect.signature(model.forward).parameters), None)
    vocabulary = vocabulary_of(model)
    if first not in _IDS or vocabulary is None:
        return None
    length = min(16, context_of(model) or 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (2, length), generator=generator)


__all__ = ["context_of", "example_ids", "vocabulary_of"]
