"""Weights of which each process has a part."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

_WAY_OUT = (
    "every process needs whole weights: load the model on each of them without sharding, or gather "
    "it (DTensor.full_tensor(), "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into "
    "a model that is not sharded"
)


def sharded(model: nn.Module) -> str | None:
    """The first tensor of which this process has a part alone, and the way out; None where all are
    whole. FSDP2, tensor parallelism and ``distribute_tensor`` leave ``DTensor``."""
    for name, tensor in _tensors(model):
        if _is_distributed(tensor):
            placements = ", ".join(str(one) for one in getattr(tensor, "placements", ()))
            return f"{name!r} is a DTensor ({placements}), spread over processes; {_WAY_OUT}"
    size = getattr(model, "tp_size", None)  # transformers, whose shards may be plain tensors
    if isinstance(size, int) and size > 1:
        return f"transformers has split its weights over {size} processes (tp_plan); {_WAY_OUT}"
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_distributed(tensor: Tensor) -> bool:
    # who has one has imported it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


__all__ = ["sharded"]
