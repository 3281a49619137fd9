"""Sites that no linear module of the model holds, in the parameters of its own class.

Stacks of experts, ``in_proj_weight`` and other weights that a model multiplies by itself cannot be
replaced by factors in its own code, so their weights are multiplied out there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxshare.capture import device_of, dtype_of
from fxshare.result.products import site_bias, slice_product
from fxshare.sites.site import Site
from fxshare.sites.tensors import Stored, stored_at
from passes.errors import FxShareError
from passes.graph.graph import is_conv1d


def held_by(sites: Iterable[Site], linears: Iterable[str]) -> tuple[list[Site], list[Site]]:
    """The sites that the modules ``linears`` hold, with those of their calls, and the others."""
    known = set(linears)
    inside: list[Site] = []
    outside: list[Site] = []
    for site in sites:
        calls = tuple(call for call in site.calls if call in known)
        (inside if calls == site.calls else outside).append(site)
    return inside, outside


def put_multiplied_out(
    result: nn.Module, gm: nn.Module, sites: Sequence[Site], known: Mapping[str, Tensor]
) -> int:
    """Give the parameters of ``result`` the weights and biases that these sites of ``gm`` stand
    for. ``known`` are the tensors of ``gm`` by name: what a parameter has beside its sites is
    theirs. Returns how many numbers that takes.

    Raises :class:`FxShareError` where a parameter has parts that nothing says.
    """
    names = dict(result.named_parameters(remove_duplicate=False))
    made: dict[str, Tensor] = {}
    missing: dict[str, int] = {}

    def put(stored: str, part: slice | int, value: Tensor) -> None:
        if stored not in names:
            raise FxShareError(
                f"{type(result).__name__} has no parameter {stored!r} of the site "
                f"{site.name!r}, so its own code cannot run the result"
            )
        if stored not in made:
            made[stored], missing[stored] = _begun(names, known, stored, gm)
        made[stored][part] = value.to(made[stored])
        missing[stored] -= value.numel()

    for site in sites:
        weight_OI = torch.cat([slice_product(gm, s.name) for s in site.slices])
        where = stored_at(site, names) or Stored(f"{site.calls[0]}.weight", f"{site.calls[0]}.bias")
        turned = site.transposed or _is_turned(result, site)
        put(where.weight, _part(where, site), weight_OI.t() if turned else weight_OI)
        bias_O = site_bias(gm, site)
        if bias_O is not None:
            put(where.bias, _part(where, site), bias_O)
    for stored, numbers in missing.items():
        if numbers > 0 and stored not in known:
            raise FxShareError(
                f"the graph does not have all of {stored!r}, which {type(result).__name__} needs "
                "to run; compile it with capture='modules'"
            )
    for stored, value in made.items():
        _set(result, names[stored], nn.Parameter(value, requires_grad=False))
    return sum(value.numel() for value in made.values())


def _begun(
    names: Mapping[str, Tensor], known: Mapping[str, Tensor], stored: str, gm: nn.Module
) -> tuple[Tensor, int]:
    like = names[stored]
    if stored in known and known[stored].shape == like.shape:
        return known[stored].detach().clone(), like.numel()
    return torch.empty(like.shape, dtype=dtype_of(gm), device=device_of(gm)), like.numel()


def _part(where: Stored, site: Site) -> slice | int:
    if where.part is None:
        return slice(None)
    return where.part if where.stacked else slice(where.part, where.part + site.out_features)


def _is_turned(result: nn.Module, site: Site) -> bool:
    try:
        return is_conv1d(result.get_submodule(site.calls[0]))
    except AttributeError:
        return False


def _set(result: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter wherever the old one is."""
    for module in result.modules():
        for leaf, tensor in module._parameters.items():
            if tensor is old:
                module._parameters[leaf] = new


__all__ = ["held_by", "put_multiplied_out"]
