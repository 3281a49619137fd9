"""The weights and biases that a compiled module stands for, multiplied out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxshare.base.quantised import Quantised
from fxshare.capture.modules import module_slices
from fxshare.plans.plan import Plan
from fxshare.sites.site import Site
from passes.graph.graph import weight_and_bias
from passes.graph.slices import Slice, basis_of, rows_of


def slices_of(module: nn.Module) -> Mapping[str, Slice]:
    """Where each slice of a compiled model is."""
    return module_slices(module)


def slice_product(module: nn.Module, name: str) -> Tensor:
    """The weight ``(out, in)`` that a slice of a compiled model stands for, in float64."""
    place = slices_of(module)[name]
    weight_OI, _ = weight_and_bias(module.get_submodule(place.module))
    stored = rows_of(module, place, weight_OI.detach())
    # a cast of codes would have codes still
    rows = stored.values(torch.float64) if isinstance(stored, Quantised) else stored.double()
    if place.basis is None:
        return place.whole_weight(rows)
    return rows @ basis_of(module, place, torch.float64).detach()


def site_bias(module: nn.Module, site: Site) -> Tensor | None:
    """The bias ``(out,)`` that a site of a compiled model adds; None where it has none."""
    rows = []
    for s in site.slices:
        place = slices_of(module)[s.name]
        _, bias = weight_and_bias(module.get_submodule(place.module))
        if bias is None:
            return None
        rows.append(place.whole_bias(rows_of(module, place, bias.detach())))
    return torch.cat(rows)


def dense_sites(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every site multiplied out, in float64."""
    return {
        site.name: torch.cat([slice_product(module, s.name) for s in site.slices])
        for site in plan.sites
    }
