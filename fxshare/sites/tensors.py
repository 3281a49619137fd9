"""The tensors of a site in the original model, whether a module or a bare parameter holds them.

A site is named after a module with a ``weight``, or after a parameter that the model multiplies by
itself: ``attn.in_proj_weight``, ``attn.in_proj_weight.rows_0_32`` for some of its rows,
``experts.down_proj.3`` for one matrix of a stack.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxshare.base.memory import trim
from fxshare.capture import Captured
from fxshare.capture.widening import in_place_of, stored_of
from fxshare.errors import MatchError
from fxshare.sites.site import Site
from passes import is_embedding, is_linear, linear_calls, weight_and_bias
from passes.graph.graph import is_conv1d, structure_copy

_LARGE = 1 << 24
"""Bytes of a matrix around which what the allocator keeps is worth giving back."""
_PART = re.compile(r"(.+)\.(?:(\d+)|rows_(\d+)_(\d+))")


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: ``holder.field[at]``."""

    holder: nn.Module
    field: str
    at: slice | int

    @property
    def bias(self) -> str:
        return _bias_of(self.field)


def _bias_of(field: str) -> str:
    stem = field.removesuffix("weight")
    return f"{stem}bias" if field.endswith("weight") else f"{field}_bias"


@dataclass(frozen=True)
class Stored:
    """Where the original's state dict has a site that is a bare parameter: the names of the weight
    and of a bias, and of which part: the number of a matrix in a stack, or the first row; None is
    the whole."""

    weight: str
    bias: str
    part: int | None = None
    stacked: bool = False


def stored_at(site: Site, known: Container[str]) -> Stored | None:
    """Where a site is among the ``known`` names of a state dict; None where it is a module's."""
    if any(f"{reader}.weight" in known for reader in site.readers):
        return None
    name, part, stacked = site.name, None, False
    found = _PART.fullmatch(name)
    if name not in known and found is not None:
        name, stacked = found[1], found[2] is not None
        part = int(found[2] if stacked else found[3])
        if name not in known:  # rows of a module's weight
            name = f"{name}.weight"
    owner, dot, field = name.rpartition(".")
    return Stored(name, f"{owner}{dot}{_bias_of(field)}", part, stacked)


def _place(model: nn.Module, name: str) -> _Place | None:
    """The parameter of a site that is no linear module; None where there is none."""
    at: slice | int = slice(None)
    if _module(model, name) is not None:
        name = f"{name}.weight"
    owner, _, field = name.rpartition(".")
    holder = _module(model, owner)
    part = _PART.fullmatch(name)
    if part is not None and holder is None:
        at = slice(int(part[3]), int(part[4])) if part[2] is None else int(part[2])
        owner, _, field = part[1].rpartition(".")
        holder = _module(model, owner)
    if holder is None or not isinstance(getattr(holder, field, None), nn.Parameter):
        return None
    return _Place(holder, field, at)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def stored_bias(module: nn.Module, field: str) -> Tensor | None:
    """The bias that goes with a parameter by its name: ``in_proj_weight`` and ``in_proj_bias``,
    ``down_proj`` and ``down_proj_bias``, ``weight`` and ``bias``."""
    found = getattr(module, _Place(module, field, slice(None)).bias, None)
    return found if isinstance(found, nn.Parameter) else None


def site_tensors(model: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """``(weight_OI, bias_O)`` of a site: views of the model's own tensors.

    Raises :class:`MatchError` where the model has no such weight.
    """
    for name in (site.name, *site.calls):
        module = _linear(model, name)
        if module is not None:
            weight_OI, own = weight_and_bias(module)
            return weight_OI, own if site.bias else None
    place = _place(model, site.name)
    if place is None:
        raise MatchError(
            f"{type(model).__name__} has no weight {site.name!r}: it is not the model that was "
            "matched"
        )
    weight = getattr(place.holder, place.field)[place.at]
    bias = stored_bias(place.holder, place.field) if site.bias else None
    weight_OI = weight.t() if site.transposed else weight
    return weight_OI, None if bias is None else bias[place.at]


def substitute(
    copy: nn.Module,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    *,
    as_kept: bool = False,
) -> None:
    """Give the sites of a structure copy other weights ``(out, in)`` and biases ``(out,)``, in the
    dtypes of the old ones, or with ``as_kept`` in those that they are kept in, where they only read
    as float32; what is not in the mappings stays."""
    own: set[int] = set()
    holders: dict[tuple[int, str], list[nn.Module]] = {}
    for holder in copy.modules():
        for field in ("weight", "bias"):
            holders.setdefault((id(holder._parameters.get(field)), field), []).append(holder)
    # a Conv1D is not a module in a captured graph, which multiplies by its weight (in, out)
    turned = set[str]()
    if isinstance(copy, fx.GraphModule):
        turned = {call.name for call in linear_calls(copy) if call.transposed}
    for site in sites:
        for values, is_weight in ((weights, True), (biases, False)):
            new = values.get(site.name)
            if new is None:
                continue
            if new.nbytes >= _LARGE:
                trim()  # what came and went while it was made lies between what stays
            put: nn.Parameter | None = None
            for call in site.readers if is_weight else site.calls:
                module = _linear(copy, call) or _embedding(copy, call)
                if module is None:
                    turn = is_weight and (site.transposed or call in turned)
                    values_at = new.t() if turn else new
                    _write(copy, call, values_at, is_weight, own, as_kept=as_kept)
                    continue
                field = "weight" if is_weight else "bias"
                old = getattr(module, field)
                if put is None:
                    stored = new.t() if is_weight and is_conv1d(module) else new
                    put = in_place_of(old, stored, as_kept=as_kept)
                    # also where the graph knows a tied weight by one of its names only
                    for holder in holders.get((id(old), field), ()):
                        setattr(holder, field, put)
                setattr(module, field, put)


def _write(
    copy: nn.Module, name: str, new: Tensor, is_weight: bool, own: set[int], *, as_kept: bool
) -> None:
    """Write into the part of a parameter that a site is, in memory of the copy's own."""
    place = _place(copy, name)
    assert place is not None, name
    field = place.field if is_weight else place.bias
    parameter = getattr(place.holder, field)
    if id(parameter) not in own:
        stored = stored_of(parameter) if as_kept else parameter
        parameter = in_place_of(parameter, stored.detach().clone(), as_kept=as_kept)
        own.add(id(parameter))
        setattr(place.holder, field, parameter)
    kept = stored_of(parameter).detach()
    kept[place.at] = new.to(kept)


def _embedding(model: nn.Module, name: str) -> nn.Module | None:
    module = _module(model, name)
    return module if module is not None and is_embedding(module) else None


def _linear(model: nn.Module, name: str) -> nn.Module | None:
    module = _module(model, name)
    return module if module is not None and is_linear(module) else None


def site_biases(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The bias ``(out,)`` of every site that has one."""
    found = {}
    for site in sites:
        _, bias = site_tensors(model, site)
        if bias is not None:
            found[site.name] = bias.detach()
    return found


def dense_weights(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every site, as views of the model's own tensors."""
    found = {}
    for site in sites:
        weight_OI = site_tensors(model, site)[0].detach()
        if weight_OI.device.type != "meta" and not bool(torch.isfinite(weight_OI).all()):
            raise MatchError(f"the weight of {site.name!r} has values that are not finite")
        found[site.name] = weight_OI
    return found


def substituted(
    captured: Captured,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> Captured:
    """The capture computing on a copy in which sites have other weights ``(out, in)`` and biases
    ``(out,)``."""
    copy = structure_copy(captured.module)
    # as large as the model, and no larger
    substitute(copy, sites, weights, biases, as_kept=True)
    return captured.computing(copy)
