"""The layout of the notebook that this project grew out of: modules per slice, nothing shared.

Each slice is ``coefficient(basis(x))``, whatever the others of its site compute; the results are
concatenated. The bases themselves are shared, their products are not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxshare.plans.plan import Plan
from fxshare.result.products import slices_of
from fxshare.sites.site import Site
from passes.graph.graph import new_linear, put_module, structure_copy, weight_and_bias
from passes.graph.slices import basis_of, rows_of


class SliceProducts(nn.Module):
    """One rewritten linear: a module per slice, their outputs side by side."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def notebook_layout(dense: nn.Module, compiled: nn.Module, plan: Plan) -> nn.Module:
    """A structure copy of ``dense`` in which every site of the plan has the notebook's layout.

    ``compiled`` is where the factors are, the result of :func:`fxshare.compile` under ``plan``;
    every basis is written out whole. Parameters beside the sites are shared with ``dense``.
    """
    result = structure_copy(dense)
    bases: dict[str, nn.Linear] = {}
    for site in plan.sites:
        module = SliceProducts([_slice(compiled, name, bases) for name in _names(site)])
        module.train(dense.training)
        for call in site.calls:
            put_module(result, call, module)
    return result


def _names(site: Site) -> list[str]:
    return [s.name for s in site.slices]


@torch.no_grad()
def _slice(compiled: nn.Module, name: str, bases: dict[str, nn.Linear]) -> nn.Module:
    place = slices_of(compiled)[name]
    weight, bias = weight_and_bias(compiled.get_submodule(place.module))
    rows = rows_of(compiled, place, weight)
    own_bias = None if bias is None else rows_of(compiled, place, bias)
    coefficient = _linear(rows, own_bias)
    if place.basis is None:
        return coefficient
    if place.basis not in bases:
        bases[place.basis] = _linear(basis_of(compiled, place), None)
    return nn.Sequential(bases[place.basis], coefficient)


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    return new_linear(weight_OI.contiguous(), bias_O, requires_grad=False, training=False)
