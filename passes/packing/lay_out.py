"""Weights as kernels like to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import bits_of, calls_by_target
from passes.graph.slices import slices

ALIGNMENT = 64
"""Bytes: a cache line, and the width of the widest vector registers of CPUs."""


@dataclass(frozen=True)
class LayOut(Pass):
    """Factors that are views into other memory, start off a cache line, or lie across the way that
    they are read get memory of their own.

    Before::

        self.q_proj.weight      # (1024, 256), rows of a larger tensor, stride (1024, 1), anywhere

    After::

        self.q_proj.weight      # stride (1, 1024), at a multiple of 64 bytes, nothing beside it

    The longer dimension is the contiguous one, on CPUs in float32. A product of one row with
    ``(O, R)`` by rows is O dot products of length R, which short rows end before they reach the
    memory's speed; ``fxshare bench run --separate`` shows what it is for. In half precision
    columns are far slower on processors without instructions for it, and in float64 they gain
    nothing, so these stay by rows.

    Only factors of shared bases: dense slices are views of the original weight, which it would
    double. The graph's text stays; the count is of tensors.
    """

    name: ClassVar[str] = "lay-out"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for module in _factors(gm):
            weight = module.weight
            if not _well_laid(weight):
                laid = _laid(weight.detach())
                module.weight = nn.Parameter(laid, requires_grad=weight.requires_grad)
                count += 1
        return count


def rows_again(gm: fx.GraphModule) -> None:
    """After a move to another dtype or device: factors by columns that are better by rows there.
    Parameters stay the objects that they are."""
    for module in _factors(gm):
        weight = module.weight
        if _is_by_columns(weight) and not wants_columns(weight):
            weight.data = weight.data.contiguous()


def _factors(gm: fx.GraphModule) -> list[nn.Linear]:
    shared = [place for place in slices(gm).values() if place.basis is not None]
    names = {place.module for place in shared} | {place.basis for place in shared}
    called = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
    found = [gm.get_submodule(name) for name in called if name in names]
    return [module for module in found if isinstance(module, nn.Linear)]


def wants_columns(weight_OR: Tensor) -> bool:
    """Whether one row of a product is faster with the columns of this factor contiguous."""
    height, width = weight_OR.shape
    return height > width and weight_OR.device.type == "cpu" and weight_OR.dtype is torch.float32


def _is_by_columns(weight_OR: Tensor) -> bool:
    return type(weight_OR) is nn.Parameter and weight_OR.t().is_contiguous()


def _laid(weight_OR: Tensor) -> Tensor:
    if wants_columns(weight_OR):
        return weight_OR.t().clone(memory_format=torch.contiguous_format).t()
    return weight_OR.clone(memory_format=torch.contiguous_format)


def _well_laid(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or bits_of(tensor) is not None:
        return True
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    ordered = tensor.t() if wants_columns(tensor) else tensor
    return whole and ordered.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
