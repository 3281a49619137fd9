"""From a compiled model to the table of shared linears, and the tensors that go with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.exporting.served.family import Family
from fxshare.exporting.served.inputs import Stack, same_input, stacks
from fxshare.exporting.subject import Subject
from fxshare.models.original import original_of
from fxshare.plans.plan import Plan
from fxshare.result.products import site_bias, slices_of
from fxshare.sites.site import Site
from fxshare.sites.tensors import stored_at
from passes.graph.graph import is_conv1d, is_linear, weight_and_bias
from passes.graph.slices import Slice, gather_order, rows_of

BASES = "bases"


@dataclass(frozen=True, eq=False)
class Table:
    """``spec`` is what the configuration says, ``tensors`` what the files hold of it by name, and
    ``sites`` the names of the sites that it has: those that read bases, and those of MLPs of which
    hidden units went; ``whole`` are those that have factors and that engines hold as one weight,
    each with the reason. ``turned`` are the ``Conv1D`` modules that become linears of one part,
    whose weights are ``(out, in)`` in the files."""

    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    sites: frozenset[str]
    whole: Mapping[str, str]
    turned: tuple[str, ...]


def table_of(subject: Subject, family: Family, *, untied: bool) -> Table:
    """The linears of the base model that read bases, by the names of the base model.

    Of a model whose bases are tied, those that are read together wherever one of them is are one
    weight, and the linears that read one input are named together.
    """
    gm, plan = subject.model, subject.record.plan
    places = slices_of(gm)
    shared = [s for s in plan.sites if any(places[p.name].basis for p in s.slices)]
    whole = {s.name: why for s in shared if (why := _why_whole(s, gm, family))}
    shared = [s for s in shared if s.name not in whole]
    bases = {places[p.name].basis: places[p.name] for s in shared for p in s.slices}
    known = {name: place for name, place in bases.items() if name is not None}
    specs = {name: _basis_spec(gm, name, place) for name, place in known.items()}
    linears = {s.name.removeprefix(family.inside): _spec(gm, s, places) for s in shared}
    spec: dict[str, Any] = {"untied": untied, "bases": specs, "linears": linears}
    tensors = dict(_tensors(gm, shared, known, family, untied=untied))
    narrow = _narrow(gm, plan, family)
    for site in narrow:
        weight_OI, bias_O = _stored(gm, site)
        linears[site.name.removeprefix(family.inside)] = _plain(weight_OI, bias_O)
        part = family.stored(f"{site.name}.parts.0")
        tensors |= {f"{part}.weight": weight_OI}
        tensors |= {} if bias_O is None else {f"{part}.bias": bias_O}
    if not untied:
        places_of = {
            s.name.removeprefix(family.inside): [places[p.name] for p in s.slices] for s in shared
        }
        together = same_input(gm, places_of)
        for stack in stacks(together, _plain_bases(linears, specs), _ranks(specs)):
            _stack(stack, spec, tensors, family)
        spec["same_input"] = [list(names) for names in together if _share(names, linears)]
    sites = frozenset(s.name for s in (*shared, *narrow))
    turned = tuple(name for name in _conv1ds(family) if name not in sites)
    for name in turned:
        module = family.model.get_submodule(name)
        spec["linears"][name.removeprefix(family.inside)] = _plain(*weight_and_bias(module))
    return Table(spec, tensors, sites, whole, turned)


def _plain_bases(
    linears: Mapping[str, Any], specs: Mapping[str, Any]
) -> Mapping[str, Sequence[str]]:
    """The bases of each linear that several of may lie in one weight: a pivoted one reads the
    inputs in an order of its own."""
    return {
        name: [p["basis"] for p in spec["parts"] if p["basis"] and not specs[p["basis"]]["pivoted"]]
        for name, spec in linears.items()
    }


def _ranks(specs: Mapping[str, Any]) -> Mapping[str, int]:
    return {name: spec["rank"] for name, spec in specs.items() if not spec["pivoted"]}


def _share(names: Sequence[str], linears: Mapping[str, Any]) -> bool:
    """Whether two of the linears read the product of one basis."""
    read = [basis for name in names for basis in {p["basis"] for p in linears[name]["parts"]}]
    return len(set(read) - {None}) < sum(basis is not None for basis in read)


def _stack(stack: Stack, spec: dict[str, Any], tensors: dict[str, Tensor], family: Family) -> None:
    """Let the bases of ``stack`` be one, of whose product each coefficient reads its columns."""
    specs = [spec["bases"].pop(name) for name in stack.rows]
    rank = sum(each["rank"] for each in specs)
    spec["bases"][stack.name] = {**specs[0], "rank": rank}
    for linear in spec["linears"].values():
        for part in linear["parts"]:
            if part["basis"] in stack.rows:
                part["columns"] = list(stack.rows[part["basis"]])
                part["basis"] = stack.name

    def stored(name: str) -> str:
        return family.stored(f"{family.inside}{BASES}.{name}.weight")

    weights = [tensors.pop(stored(name)) for name in stack.rows]
    tensors[stored(stack.name)] = torch.cat(weights)


def _conv1ds(family: Family) -> Iterator[str]:
    for name, module in family.model.named_modules():
        if is_conv1d(module) and name.startswith(family.inside):
            yield name


def _narrow(gm: nn.Module, plan: Plan, family: Family) -> list[Site]:
    """The sites of MLPs of which hidden units went: linears with fewer rows or columns, which the
    model's own code runs with. What goes of heads is zeros: engines keep one cache for all."""
    known = {site.name: site for site in plan.sites}
    found: list[Site] = []
    for one in plan.units:
        if one.kept < one.of and one.runs_apart:
            sites = [known[name] for name in one.sites]
            found += sites if all(_why_whole(s, gm, family) is None for s in sites) else []
    return found


def _stored(gm: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a site without bases, as the compiled model has them."""
    weights, biases = [], []
    for part in site.slices:
        place = slices_of(gm)[part.name]
        weight, bias = weight_and_bias(gm.get_submodule(place.module))
        weights.append(rows_of(gm, place, weight.detach()))
        if bias is not None:
            biases.append(rows_of(gm, place, bias.detach()))
    return torch.cat(weights), torch.cat(biases) if biases else None


def _plain(weight_OI: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """What the configuration says of a linear of one part, which reads no basis."""
    rows, in_features = weight_OI.shape
    parts = [{"basis": None, "rows": rows}]
    return {"in_features": in_features, "bias": bias is not None, "parts": parts}


def _why_whole(site: Site, gm: nn.Module, family: Family) -> str | None:
    """Why a site is one weight in the folder, although the compiled model has factors of it."""
    if site.lookups:
        return "rows of it are looked up"
    if not site.name.startswith(family.inside):
        return "engines make the head themselves"
    if stored_at(site, original_of(gm).state) is not None or not is_linear(
        family.model.get_submodule(site.name)
    ):
        return "it is no linear module of the original"
    if len(site.calls) > 1:
        return "several modules have this weight"
    return None


def bytes_of_whole(plan: Plan, gm: nn.Module, names: Mapping[str, str]) -> int:
    """How many bytes the sites take that are multiplied out."""
    places = slices_of(gm)
    sizes = [
        site.weights * _weight(gm, places[site.slices[0].name]).element_size()
        for site in plan.sites
        if site.name in names
    ]
    return sum(sizes)


def _weight(gm: nn.Module, place: Slice) -> Tensor:
    weight, _ = weight_and_bias(gm.get_submodule(place.module))
    return weight


def _basis_spec(gm: nn.Module, name: str, place: Slice) -> dict[str, Any]:
    stored_RT, _ = weight_and_bias(gm.get_submodule(name))
    rank, width = stored_RT.shape
    in_features = rank + width if place.pivoted else width
    return {"in_features": in_features, "rank": rank, "pivoted": place.pivoted}


def _spec(gm: nn.Module, site: Site, places: Mapping[str, Slice]) -> dict[str, Any]:
    parts = [{"basis": basis, "rows": sum(n)} for basis, n in _runs(site, places)]
    return {
        "in_features": site.in_features,
        "bias": site_bias(gm, site) is not None,
        "parts": parts,
    }


def _runs(site: Site, places: Mapping[str, Slice]) -> Iterator[tuple[str | None, list[int]]]:
    """Neighbouring slices of one basis, with the rows of each: one product for all of them."""
    last: tuple[str | None, list[int]] | None = None
    for part in site.slices:
        basis = places[part.name].basis
        if last is not None and last[0] == basis:
            last[1].append(part.out_features)
            continue
        if last is not None:
            yield last
        last = (basis, [part.out_features])
    if last is not None:
        yield last


def _tensors(
    gm: nn.Module,
    sites: list[Site],
    bases: Mapping[str, Slice],
    family: Family,
    *,
    untied: bool,
) -> Iterator[tuple[str, Tensor]]:
    inside = family.inside
    places = slices_of(gm)
    for site in sites:
        slices = iter(site.slices)
        bias_O = site_bias(gm, site)
        row = 0
        for number, (_, lengths) in enumerate(_runs(site, places)):
            run = [places[next(slices).name] for _ in lengths]
            # zeros where heads have gone
            rows = [p.whole_weight(rows_of(gm, p, _weight(gm, p).detach())) for p in run]
            name = family.stored(f"{site.name}.parts.{number}")
            yield f"{name}.weight", torch.cat(rows)
            if bias_O is not None:
                yield f"{name}.bias", bias_O[row : row + sum(lengths)]
            row += sum(lengths)
        own = dict.fromkeys(b for b, _ in _runs(site, places) if b is not None)
        for basis in own if untied else ():
            name = family.stored(f"{site.name}.{BASES}.{basis}")
            yield from _basis_tensors(gm, basis, bases[basis], name)
    for basis, place in {} if untied else bases.items():
        yield from _basis_tensors(gm, basis, place, family.stored(f"{inside}{BASES}.{basis}"))


def _basis_tensors(
    gm: nn.Module, basis: str, place: Slice, name: str
) -> Iterator[tuple[str, Tensor]]:
    stored, _ = weight_and_bias(gm.get_submodule(basis))
    copied = stored.detach().clone()  # what is the same memory, files hold once
    if not place.pivoted:
        yield f"{name}.weight", copied
        return
    order = gather_order(gm, basis)
    assert order is not None
    yield f"{name}.table.weight", copied
    yield f"{name}.order", order
