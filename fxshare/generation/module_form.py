"""A compiled graph's weights in the model's own class: what generates where no graph can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture import device_of, dtype_of
from fxshare.capture.modules_front_end import linears_side_by_side, put_back
from fxshare.compiling import rewrite
from fxshare.errors import FxShareError
from fxshare.factors import empty_factors
from fxshare.generation.structure import structure_of, tensors_by_name
from fxshare.lowering import readable
from fxshare.plans import Plan
from fxshare.record import record_of, slices_of
from passes import derive_gathers, derived_buffers
from passes.graph import is_linear, weight_and_bias
from passes.slices import Slice, rows_of


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
    groups, pivots = empty_factors(record.plan, lambda _: dtype_of(gm), torch.device("meta"))
    # what lowering multiplied out is one weight now
    groups = [g for g in groups if all(places[name].basis for name in g.coefficients)]
    names = {group.name for group in groups}
    rewritten, _ = rewrite(
        linears_side_by_side(structure.model),
        record.plan,
        groups,
        False,
        structure.passes,
        pivots=[pivot for pivot in pivots if pivot.name in names],
    )
    sites = [call for site in record.plan.sites for call in site.calls]
    result = put_back(structure.model, rewritten, sites, copy=False)
    with torch.no_grad():
        filled: set[int] = set()
        for name, place in slices_of(result).items():
            _fill_slice(result, place, gm, places[name], filled)
        _fill_by_name(result, gm, tensors_by_name(gm, structure.model), filled)
    derive_gathers(result)
    result.__dict__["fxshare"] = record
    return result.train(gm.training)


def _check_linears(model: nn.Module, plan: Plan) -> None:
    linears = {n for n, m in model.named_modules(remove_duplicate=False) if is_linear(m)}
    missing = next((c for site in plan.sites for c in site.readers if c not in linears), None)
    if missing is not None:
        raise FxShareError(
            f"{type(model).__name__} has no linear module {missing!r} that could be rewritten by "
            "itself: it is an embedding, or in a parameter with others. The model's own code "
            "cannot run it, and no graph could be made for this call: generate with the default "
            "cache and options, or leave it out of the configuration"
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
