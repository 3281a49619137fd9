"""Half precision on processors without instructions for it: what is trained computes in float32.

On an AMD EPYC of the third generation a linear of 384 to 1,536 features takes six times as long in
float16 as in float32, on 1,024 tokens and one thread, and seven times in bfloat16; a step of
all-MiniLM-L6-v2 more than twenty times in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxshare.base.placement import device_of, dtype_of, multiplies
from fxshare.capture.widening import cast_to_float32
from fxshare.refining.options import RefineOptions
from fxshare.verifying.evaluated import only_in_its_dtype

_HALF = (torch.float16, torch.bfloat16)


def is_wide(gm: nn.Module, options: RefineOptions) -> bool:
    """Whether a compiled model in half precision is trained in float32: on a CPU where that is
    faster, but for block by block, with ``shard``, and for a graph that holds in its own dtype."""
    device, dtype = device_of(gm), dtype_of(gm)
    if multiplies(device, dtype):
        return False
    return not (options.objective == "blocks" or options.shard or only_in_its_dtype(gm))


def in_float32(tensor: Tensor) -> Tensor:
    """A tensor in half precision in float32; another, and codes, as it is."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return tensor.float() if plain and tensor.dtype in _HALF else tensor


def widen_rest(module: nn.Module) -> None:
    """Let a copy whose parameters are in float32 compute in it: its buffers and the dtypes that
    its graphs name."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = in_float32(buffer)
        if isinstance(part, fx.GraphModule):
            cast_to_float32(part)


__all__ = ["in_float32", "is_wide", "widen_rest"]
