"""What the planner minimises under what limits, from the configuration's budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from torch import nn

from fxshare.capture import dtype_of
from fxshare.config import Budget, Planner
from fxshare.cost_model import PREFILL, SIDE_UNIT, Rates, dense_seconds, time_shares
from fxshare.cost_model.device import how_to_measure_for, rates_of_model
from fxshare.cost_model.whole import prompt_length
from fxshare.errors import PlanError
from fxshare.planning.nodes import shape_of
from fxshare.planning.solver.problem import Node, Part
from fxshare.plans.bits import Bits, factor_bytes, matrix_bytes
from fxshare.plans.cost import Shape, flops, numbers, weights_bytes
from fxshare.plans.storage import STORAGES, Ints, Storage, storages_of
from fxshare.sites.site import Site


def options_of(budget: Budget, planner: Planner, model: nn.Module) -> Options:
    """What the configuration allows the planner, costs in the unit of its limit."""
    by_time = _asked(budget, planner)
    rates = None if by_time is None else _rates(model, by_time)
    found = options_for(budget, planner, dtype_of(model).itemsize, rates)
    return replace(found, prompt=prompt_length(model))


def options_for(
    budget: Budget, planner: Planner, element_size: int, rates: Rates | None = None
) -> Options:
    """:func:`options_of` a model whose numbers have so many bytes."""
    alone = budget.params_kept is None and budget.max_bytes is None
    alone = alone and budget.max_loss_increase is None and budget.bytes_kept is None
    in_bytes = budget.max_bytes is not None or budget.bytes_kept is not None
    return Options(
        unit="flops" if alone else "bytes" if in_bytes else "numbers",
        storages=storages_of(planner.storage),
        element_size=element_size,
        max_group=planner.max_group,
        rank_multiple=planner.rank_multiple,
        floor=planner.floor,
        ceiling=planner.ceiling,
        flops_kept=None if alone else budget.flops_kept,
        time_kept=budget.time_kept,
        rates=rates,
        never_slower=_never_slower(budget, planner),
        keep_dense=frozenset(planner.keep_dense),
        may_share=tuple(frozenset(types) for types in planner.may_share),
        tie=tuple(frozenset(names) for names in planner.tie),
        bits=widths_of(planner.bits),
        shares_bases="basis" in planner.kinds,
    )


def _never_slower(budget: Budget, planner: Planner) -> bool:
    given = planner.never_slower
    return budget.time_kept is not None if given is None else given


def _asked(budget: Budget, planner: Planner) -> str | None:
    """The field of the configuration that needs predicted times; None where none does."""
    if budget.time_kept is not None:
        return "budget.time_kept"
    return "planner.never_slower" if planner.never_slower else None


def _rates(model: nn.Module, asked: str) -> Rates:
    rates = rates_of_model(model)
    if rates is None:
        raise PlanError(
            f"{asked}: times are predicted from constants of this device, which were not "
            f"measured for the model's dtype and this number of threads; run "
            f"{how_to_measure_for(model)}"
        )
    return rates


def bytes_of(model: nn.Module) -> int:
    """Bytes of every parameter and buffer."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def limit_of(whole: int, budget: Budget, sites: Sequence[Site], options: Options) -> float:
    """The budget in the options' unit, of a model that has ``whole`` bytes in all."""
    dense = sum(site.weights for site in sites)
    if budget.params_kept is not None:
        return float(int(budget.params_kept * dense))
    if budget.max_bytes is not None:
        rest = whole - dense * options.element_size
        if budget.max_bytes <= rest:
            raise PlanError(
                f"budget.max_bytes: {budget.max_bytes:,} bytes; what is not rewritten alone takes "
                f"{rest:,}. Match more weights, or raise the budget"
            )
        return float(budget.max_bytes - rest)
    if budget.bytes_kept is not None:
        return float(int(budget.bytes_kept * dense * options.element_size))
    if budget.max_loss_increase is not None:
        return float(dense)
    assert budget.flops_kept is not None
    return budget.flops_kept * 2 * dense


def widths_of(bits: Sequence[int]) -> tuple[Bits | None, ...]:
    """Widths of numbers; None for the model's own dtype."""
    return tuple(_WIDTHS[one] for one in bits)


_WIDTHS: Mapping[int, Bits | None] = MappingProxyType({16: None, 8: 8, 4: 4})
Unit = Literal["numbers", "bytes", "flops"]


@dataclass(frozen=True)
class Options:
    """What a planning problem allows. ``floor`` and ``ceiling`` are shares of a group's dense cost;
    ``flops_kept`` bounds the plan's operations by that share of the dense ones."""

    unit: Unit = "numbers"
    storages: tuple[Storage, ...] = STORAGES
    element_size: int = 4
    max_group: int | None = None
    rank_multiple: int | None = None
    floor: float = 0.0
    ceiling: float = 1.0
    flops_kept: float | None = None
    time_kept: float | None = None
    """Bounds the predicted time by that share of the dense one; needs ``rates``."""
    rates: Rates | None = None
    prompt: int = PREFILL
    """Tokens of the prompt that times are predicted for."""
    never_slower: bool = False
    """A group that is predicted to take longer than its dense weights stays dense; needs
    ``rates``."""
    keep_dense: frozenset[int] = frozenset()
    may_share: tuple[frozenset[str], ...] = ()
    tie: tuple[Part, ...] = ()
    bits: tuple[Bits | None, ...] = (None,)
    """How many bits a number may have; None for the model's own dtype."""
    shares_bases: bool = True
    """Whether there are bases at all; without them only other kinds save anything."""


Side = Callable[[Shape, Ints, Storage | None], Ints]
"""The cost of a group in the second unit at ranks; dense where there is no storage."""


def second_unit(alone: Sequence[Shape], options: Options) -> tuple[Side, float | None]:
    """What the plan is bounded in beside its budget, and the bound; ``alone`` are the shapes of all
    slices."""
    if options.time_kept is None:
        limit = options.flops_kept
        whole = sum(shape.dense_flops for shape in alone)
        return _operations, None if limit is None else limit * whole
    rates, prompt = options.rates, options.prompt
    assert rates is not None
    whole_seconds = dense_seconds(rates, alone, prompt=prompt)

    def share(shape: Shape, rank: Ints, storage: Storage | None) -> Ints:
        return time_shares(rates, shape, rank, storage, whole_seconds, prompt=prompt)

    return share, options.time_kept * SIDE_UNIT


def _operations(shape: Shape, rank: Ints, storage: Storage | None) -> Ints:
    if storage is None:
        return np.array([shape.dense_flops])
    return flops(shape, rank, storage)


def unit_cost(
    shape: Shape,
    rank: Ints,
    storage: Storage,
    options: Options,
    *,
    dense: bool = False,
    bits: int | None = None,
) -> Ints:
    """Costs of a group of this shape at every one of the ranks, in the unit of ``options``; with
    ``dense`` the one cost of its slices as they are. ``bits`` are those of each number."""
    if dense:
        return np.array([_dense(shape, options, bits)])
    if options.unit == "bytes" and bits is not None:
        width, out, size = shape.in_features, shape.out_features, options.element_size
        found: Ints = factor_bytes(storage, rank, width, out, bits, size)
        return found
    if options.unit == "numbers":
        return numbers(shape, rank, storage)
    if options.unit == "bytes":
        return weights_bytes(shape, rank, storage, options.element_size)
    return flops(shape, rank, storage)


def dense_cost(nodes: Mapping[str, Node], name: str, options: Options) -> int:
    """What the slice ``name`` costs dense, in the unit of ``options``."""
    return _dense(shape_of(nodes, frozenset({name})), options)


def _dense(shape: Shape, options: Options, bits: int | None = None) -> int:
    if options.unit == "numbers":
        return shape.dense_numbers
    if options.unit == "bytes":
        size = options.element_size
        return int(matrix_bytes(bits, shape.out_features, shape.in_features, size))
    return shape.dense_flops
