"""A compiled graph's weights in the model's own class: what generates where no graph can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture import device_of, dtype_of
from fxshare.capture.modules import linears_side_by_side, put_back
from fxshare.factors.empty import empty_factors
from fxshare.generation.factored_embedding import factored
from fxshare.models.structure import structure_of, tensors_by_name
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from fxshare.rewriting.lowering import readable
from fxshare.rewriting.rewrite import rewrite
from passes import derive_gathers, derived_buffers, is_embedding, is_linear, weight_and_bias
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
    _check_linears(structure.model, record.plan)
    if record.lowered is not None:
        gm = readable(gm)
    places = slices_of(gm)
    plan = _of_linears(record.plan)
    groups, pivots = empty_factors(plan, lambda _: dtype_of(gm), torch.device("meta"))
    # what lowering multiplied out is one weight now
    groups = [g for g in groups if all(places[name].basis for name in g.coefficients)]
    names = {group.name for group in groups}
    rewritten, _ = rewrite(
        linears_side_by_side(structure.model),
        plan,
        groups,
        False,
        structure.passes,
        pivots=[pivot for pivot in pivots if pivot.name in names],
    )
    sites = [call for site in plan.sites for call in site.calls]
    result = put_back(structure.model, rewritten, sites, copy=False)
    with torch.no_grad():
        _put_embeddings(result, gm, record.plan)
        filled: set[int] = set()
        for name, place in slices_of(result).items():
            _fill_slice(result, place, gm, places[name], filled)
        _fill_by_name(result, gm, tensors_by_name(gm, structure.model), filled)
    derive_gathers(result)
    result.__dict__["fxshare"] = record
    return result.train(gm.training)


def _of_linears(plan: Plan) -> Plan:
    """The plan without what is looked up: a head that is tied to an embedding is a linear here."""
    sites = tuple(s.model_copy(update={"lookups": ()}) for s in plan.sites if s.calls)
    there = {s.name for site in sites for s in site.slices}
    groups = []
    for group in plan.groups:
        names = tuple(name for name in group.slices if name in there)
        groups += [group.model_copy(update={"slices": names})] if names else []
    return plan.model_copy(update={"sites": sites, "groups": tuple(groups)})


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


def _check_linears(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name for name, module in modules.items() if is_linear(module)}
    linears |= {name for name, module in modules.items() if is_embedding(module)}
    missing = next((c for site in plan.sites for c in site.readers if c not in linears), None)
    if missing is not None:
        raise FxShareError(
            f"{type(model).__name__} has no module {missing!r} that could be rewritten by itself: "
            "it is in a parameter with others. The model's own code cannot run it, and no graph "
            "could be made for this call: generate with the default cache and options, or leave it "
            "out of the configuration"
        )


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
) -> None:
    """Everything that was not rewritten has the name that it had."""
    derived = derived_buffers(result)
    for path, module in result.named_modules(remove_duplicate=False):
        if id(module) in filled:
            continue
        missing = False
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                name = f"{path}.{leaf}".lstrip(".")
                if tensor is None or name in derived or tensor.device.type != "meta":
                    continue
                if name in known:
                    held[leaf] = known[name]
                    continue
                missing = True
                held[leaf] = torch.empty_like(tensor, device=device_of(gm))
        if missing:
            _compute_buffers(result, module, path)


def _compute_buffers(result: Any, module: nn.Module, path: str) -> None:
    """Buffers that no graph reads, such as the first rotary frequencies, follow from the
    configuration: transformers computes them where it would initialise weights."""
    if module._parameters or not hasattr(result, "_init_weights"):
        raise FxShareError(
            f"the graph does not have the tensors of {path!r}, which {type(result).__name__} needs "
            "to run; compile it with capture='modules'"
        )
    with torch.random.fork_rng(devices=[]):
        result._init_weights(module)
