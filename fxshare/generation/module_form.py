"""A compiled graph's weights in the model's own class: what generates where no graph can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fxshare.base.randomness import randomness_as_before
from fxshare.capture import device_of, dtype_of
from fxshare.capture.modules import linears_side_by_side, put_back
from fxshare.factors.empty import empty_factors, empty_units
from fxshare.generation.factored_embedding import factored
from fxshare.generation.multiplied_out import held_by, put_multiplied_out
from fxshare.generation.unread import is_never_read, never_read
from fxshare.models.structure import structure_of, tensors_by_name, without_values
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from fxshare.rewriting.lowering import readable
from fxshare.rewriting.rewrite import rewrite
from fxshare.sites.site import Site
from passes import derive_gathers, derived_buffers, weight_and_bias
from passes.errors import FxShareError
from passes.graph.slices import Slice, rows_of


def module_form(gm: nn.Module) -> nn.Module:
    """A module of the original's class, as capture at module granularity makes it, over the tensors
    of the graph module ``gm``: views of them, where rows were not put in another order.

    Raises :class:`FxShareError` where ``gm`` is not the graph of a transformers model.
    """
    structure, record = structure_of(gm), record_of(gm)
    if structure is None or not isinstance(gm, fx.GraphModule):
        raise FxShareError(
            f"{type(gm).__name__} is not the graph of a transformers model, whose class can run it"
        )
    if record.lowered is not None:
        gm = readable(gm)
    places = slices_of(gm)
    plan = _of_linears(record.plan)
    linears = linears_side_by_side(structure.model)
    called = (str(node.target) for node in linears.graph.nodes if node.op == "call_module")
    inside, outside = held_by(plan.sites, called)
    torn = {n for u in plan.units if not (u.runs_apart and u.is_within(inside)) for n in u.sites}
    outside += [site for site in inside if site.name in torn]
    plan = _part(plan, [site for site in inside if site.name not in torn])
    units = empty_units(plan, lambda _: dtype_of(gm), torch.device("meta"))
    groups, pivots = empty_factors(plan, lambda _: dtype_of(gm), torch.device("meta"))
    # what lowering multiplied out is one weight now
    groups = [g for g in groups if all(places[name].basis for name in g.coefficients)]
    names = {group.name for group in groups}
    rewritten, _ = rewrite(
        linears,
        plan,
        groups,
        False,
        structure.passes,
        pivots=[pivot for pivot in pivots if pivot.name in names],
        units=units,
        apart=True,
    )
    sites = [call for site in plan.sites for call in site.calls]
    result = put_back(structure.model, rewritten, sites, copy=False)
    known = tensors_by_name(gm, structure.model)
    with torch.no_grad():
        _put_embeddings(result, gm, record.plan)
        filled: set[int] = set()
        for name, place in slices_of(result).items():
            _fill_slice(result, place, gm, places[name], filled)
        put_multiplied_out(result, gm, outside, known)
        result.__dict__["unread"] = _fill_by_name(result, gm, known, filled)
    derive_gathers(result)
    result.__dict__["fxshare"] = record
    return result.train(gm.training)


def _of_linears(plan: Plan) -> Plan:
    """The plan without what is looked up: a head that is tied to an embedding is a linear here."""
    return _part(plan, [s.model_copy(update={"lookups": ()}) for s in plan.sites if s.calls])


def _part(plan: Plan, sites: Sequence[Site]) -> Plan:
    there = {s.name for site in sites for s in site.slices}
    groups = []
    for group in plan.groups:
        names = tuple(name for name in group.slices if name in there)
        groups += [group.model_copy(update={"slices": names})] if names else []
    units = tuple(one for one in plan.units if one.is_within(sites))
    return plan.model_copy(update={"sites": tuple(sites), "groups": tuple(groups), "units": units})


def _put_embeddings(result: nn.Module, gm: nn.Module, plan: Plan) -> None:
    """In place of each embedding that is a site, one over the factors of the graph module."""
    for site in plan.sites:
        for name in site.lookups:
            place = slices_of(gm)[site.slices[0].name]
            rows = gm.get_submodule(place.module)
            basis = None if place.basis is None else gm.get_submodule(place.basis)
            embedding = result.get_submodule(name)
            assert isinstance(embedding, nn.Embedding)
            result.set_submodule(name, factored(embedding, rows, basis))


def _fill_slice(
    result: nn.Module, place: Slice, gm: nn.Module, source: Slice, filled: set[int]
) -> None:
    linear, from_linear = result.get_submodule(place.module), gm.get_submodule(source.module)
    weight_OI, bias_O = weight_and_bias(from_linear)
    linear._parameters["weight"] = _parameter(rows_of(gm, source, weight_OI.detach()))
    if bias_O is not None:
        linear._parameters["bias"] = _parameter(rows_of(gm, source, bias_O.detach()))
    filled.add(id(linear))
    if place.basis is not None and source.basis is not None:
        basis, from_basis = result.get_submodule(place.basis), gm.get_submodule(source.basis)
        basis._parameters["weight"] = from_basis._parameters["weight"]
        if "kept" in from_basis._buffers:
            basis._buffers["kept"] = from_basis._buffers["kept"]
        filled.add(id(basis))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _fill_by_name(
    result: nn.Module, gm: nn.Module, known: Mapping[str, Tensor], filled: set[int]
) -> list[str]:
    """Everything that was not rewritten has the name that it had. Returns the names of the tensors
    that the graph does not have and that do not follow from the configuration."""
    derived, unread = derived_buffers(result), []
    for path, module in result.named_modules(remove_duplicate=False):
        if id(module) in filled:
            continue
        missing: list[str] = []
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                name = f"{path}.{leaf}".lstrip(".")
                if tensor is None or name in derived or tensor.device.type != "meta":
                    continue
                if name in known:
                    held[leaf] = known[name]
                else:
                    held[leaf] = never_read(tensor, dtype_of(gm), device_of(gm))
                    missing.append(leaf)
        buffers = [leaf for leaf in missing if leaf in module._buffers]
        if buffers and not isinstance(module, _NormBase):  # running statistics were learned
            computed = _compute_buffers(result, module, buffers)
            missing = [leaf for leaf in missing if leaf not in computed]
        unread += [f"{path}.{leaf}".lstrip(".") for leaf in missing]
    return unread


def _compute_buffers(result: Any, module: nn.Module, names: Sequence[str]) -> list[str]:
    """Buffers that no graph reads, such as the first rotary frequencies, follow from the
    configuration: transformers computes them where it would initialise weights, of which the
    stand-in here has none. Returns the names of those that it computed."""
    if not hasattr(result, "_init_weights"):
        return []
    stand_in = without_values(module)
    for name in names:
        empty = module._buffers[name]
        assert empty is not None
        stand_in._buffers[name] = empty.clone()
    with randomness_as_before():
        result._init_weights(stand_in)
    found = {name: stand_in._buffers[name] for name in names}
    whole = {n: t for n, t in found.items() if t is not None and not is_never_read(t)}
    module._buffers.update(whole)
    return list(whole)


def unread_by(module: nn.Module) -> Sequence[str]:
    """The parameters of a module form that have no value (:mod:`fxshare.generation.unread`)."""
    found: Sequence[str] = module.__dict__.get("unread", ())
    return found
