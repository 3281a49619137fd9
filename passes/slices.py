"""Where the slices of the original weights are now.

Names outlive nodes and modules: ``transformer.h.0.attn.c_attn.q.3`` names the rows of head 3 of q
before any rewriting, after splitting, and after its coefficient was fused with its neighbours'.
Every pass that moves a slice writes its new place into ``gm.meta["slices"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from passes.errors import PassError
from passes.graph import weight_and_bias

_KEY = "slices"


@dataclass(frozen=True)
class Slice:
    """Rows ``start:stop`` of the linear ``module`` compute one slice; with ``basis`` set, that
    linear is a coefficient and reads the product of the basis module of that name; ``pivoted``
    says that the basis is stored as kept inputs and a table (:class:`passes.PivotBasis`)."""

    module: str
    start: int
    stop: int
    basis: str | None = None
    pivoted: bool = False


def slices(gm: fx.GraphModule) -> Mapping[str, Slice]:
    """Every slice by its name, in the order in which they were split."""
    found: Mapping[str, Slice] = gm.meta.get(_KEY, {})
    return found


def set_slices(gm: fx.GraphModule, places: Mapping[str, Slice]) -> None:
    """Record new places; a fresh mapping, because copies of a graph share their ``meta`` values."""
    gm.meta[_KEY] = {**slices(gm), **places}


def slice_weight(gm: fx.GraphModule, name: str) -> Tensor:
    """The weight ``(out, in)`` that the slice stands for: a view, or ``coefficient @ basis``.

    Raises :class:`PassError` when there is no such slice.
    """
    place = slices(gm).get(name)
    if place is None:
        known = ", ".join(list(slices(gm))[:4])
        raise PassError(f"no slice named {name!r}; the graph has {known or 'none'}, ...")
    weight_OI, _ = weight_and_bias(gm.get_submodule(place.module))
    rows = weight_OI[place.start : place.stop]
    if place.basis is None:
        return rows
    return torch.matmul(rows, basis_matrix(gm, place.basis, pivoted=place.pivoted))


def basis_matrix(gm: nn.Module, name: str, *, pivoted: bool) -> Tensor:
    """The basis ``(R, I)`` of a module, whether it is stored whole or pivoted."""
    module = gm.get_submodule(name)
    weight_RT, _ = weight_and_bias(module)
    if not pivoted:
        return weight_RT
    kept = module.kept
    assert isinstance(kept, Tensor)
    rank, features = weight_RT.shape[0], sum(weight_RT.shape)
    others = torch.ones(features, dtype=torch.bool, device=kept.device)
    others[kept.long()] = False
    basis_RI = weight_RT.new_zeros(rank, features)
    basis_RI[:, kept.long()] = torch.eye(rank, dtype=weight_RT.dtype, device=weight_RT.device)
    basis_RI[:, others] = weight_RT
    return basis_RI
