"""Weights as kernels like to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import bits_of, calls_by_target
from passes.graph.slices import slices

ALIGNMENT = 64
"""Bytes: a cache line, and the width of the widest vector registers of CPUs."""


@dataclass(frozen=True)
class LayOut(Pass):
    """Factors that are views into other memory, or start off a cache line, get memory of their own.

    Before::

        self.q_proj.weight      # rows of a larger tensor, stride (1024, 1), at an odd address

    After::

        self.q_proj.weight      # contiguous, at a multiple of 64 bytes, nothing beside it

    Only factors of shared bases: dense slices are views of the original weight, which it would
    double. The graph's text stays; the count is of tensors.
    """

    name: ClassVar[str] = "lay-out"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        shared = [place for place in slices(gm).values() if place.basis is not None]
        factors = {place.module for place in shared} | {place.basis for place in shared}
        count = 0
        for name in calls_by_target(gm, lambda module: isinstance(module, nn.Linear)):
            if name not in factors:
                continue
            module = gm.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, Tensor)
            if not _well_laid(weight):
                laid = weight.detach().clone().contiguous()
                module.weight = nn.Parameter(laid, requires_grad=weight.requires_grad)
                count += 1
        return count


def _well_laid(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or bits_of(tensor) is not None:
        return True
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return whole and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
