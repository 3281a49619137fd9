"""From a plan to its predicted time beside the dense model's. Pure: no torch in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fxshare.cost_model.rates import Floats, Rates
from fxshare.cost_model.work import (
    Matmul,
    Operation,
    Step,
    Traffic,
    pass_seconds,
    seconds,
)
from fxshare.plans.cost import Shape
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import Storage
from fxshare.sites.site import Site

PREFILL, DECODE = 512, 1
"""Tokens of the two steps: a prompt, and the next token."""


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds per token of one step. ``whole`` says whether they are of the whole model
    or of the matched linears alone."""

    step: str
    tokens: int
    compiled: bool
    whole: bool
    dense: float
    plan: float

    @property
    def speedup(self) -> float:
        """Dense over plan: above 1 the plan is faster."""
        return self.dense / self.plan


def linears_of(plan: Plan, tokens: int, *, dense: bool = False) -> list[Operation]:
    """The operations of the matched linears on ``tokens`` rows: the dense ones, or the plan's.

    Of the plan: one product per basis and site (sites that read one activation are not known here,
    so that this is an upper bound), one for the coefficients of a site that read it, and a gather
    of each basis that keeps inputs as they are.
    """
    home = {name: group for group in plan.groups for name in group.slices}
    found: list[Operation] = []
    fewer = {} if dense else _sizes(plan)
    for site in plan.sites:
        for _ in site.calls:
            taken = [fewer[s.name] for s in site.slices if s.name in fewer]
            if len(taken) == len(site.slices):
                found.append(Matmul(tokens, taken[0][0], sum(out for _, out in taken)))
            elif dense or not (taken or any(s.name in home for s in site.slices)):
                found.append(Matmul(tokens, site.in_features, site.out_features))
            else:
                found += _site(site, home, tokens, fewer)
        for _ in site.lookups:
            group = home.get(site.slices[0].name)
            if group is not None and not dense:
                found.append(Matmul(tokens, group.rank, site.in_features))
    return found


def _sizes(plan: Plan) -> dict[str, tuple[int, int]]:
    """The sizes ``(in, out)`` of the slices that entries of other kinds than a basis have."""
    found: dict[str, tuple[int, int]] = {}
    for one in plan.units:
        found |= one.slice_sizes(plan.sites)
    return found


def _site(
    site: Site, home: dict[str, Group], tokens: int, fewer: Mapping[str, tuple[int, int]]
) -> list[Operation]:
    out: Counter[str] = Counter()
    groups = {}
    for s in site.slices:
        group = home.get(s.name)
        key = "" if group is None else group.name
        out[key] += fewer[s.name][1] if s.name in fewer else s.out_features
        if group is not None:
            groups[key] = group
    found: list[Operation] = []
    for key, width in out.items():
        group = groups.get(key)
        if group is None:
            found.append(Matmul(tokens, site.in_features, width))
            continue
        inner = group.stored_as.basis_width(group.rank, site.in_features)
        if group.stored_as.keeps_inputs:
            numbers = tokens * site.in_features
            found.append(Traffic(numbers, numbers))
        if inner:
            found.append(Matmul(tokens, inner, group.rank))
        found.append(Matmul(tokens, group.rank, width))
    if len(out) > 1:
        numbers = tokens * site.out_features
        found.append(Traffic(numbers, numbers))
    return found


def without_linears(step: Step, linears: Step) -> list[Operation]:
    """What is left of a whole pass without these products; a batch of rows counts as rows."""
    taken = Counter(_key(o) for o in linears if isinstance(o, Matmul))
    rest: list[Operation] = []
    for o in step:
        if isinstance(o, Matmul) and taken[_key(o)] > 0:
            taken[_key(o)] -= 1
        else:
            rest.append(o)
    return rest


def _key(o: Matmul) -> tuple[int, int, int]:
    return (o.batch * o.rows, o.inner, o.out)


def forecasts(
    plan: Plan,
    rates: Rates,
    *,
    prefill: int = PREFILL,
    whole: Mapping[int, Step] | None = None,
) -> list[Forecast]:
    """Prefill of ``prefill`` tokens and decode, eager and compiled; of the matched linears, and of
    the whole model where ``whole`` has the dense model's operations at that number of tokens."""
    found = []
    for name, tokens in (("prefill", prefill), ("decode", DECODE)):
        dense, planned = linears_of(plan, tokens, dense=True), linears_of(plan, tokens)
        for compiled in (False, True):
            found.append(_forecast(name, tokens, compiled, False, rates, dense, planned))
            if whole is not None and tokens in whole:
                rest = without_linears(whole[tokens], dense)
                with_rest = ([*rest, *dense], [*rest, *planned])
                found.append(_forecast(name, tokens, compiled, True, rates, *with_rest))
    return found


def _forecast(
    name: str,
    tokens: int,
    compiled: bool,
    whole: bool,
    rates: Rates,
    dense: Sequence[Operation],
    plan: Sequence[Operation],
) -> Forecast:
    of = pass_seconds if whole else seconds
    before, after = (of(rates, step, compiled=compiled) / tokens for step in (dense, plan))
    return Forecast(name, tokens, compiled, whole, before, after)


def product_seconds(
    rates: Rates, shape: Shape, rank: ArrayLike, storage: Storage | None, *, tokens: int
) -> Floats:
    """Seconds of a group's products at every rank, ``tokens`` rows of each distinct input; the
    dense ones where ``storage`` is None.

    For the planner, which adds groups up: launches are left out (lowering merges the products of
    one site) and weights come from memory, whatever else there is. Dense rows are a part of a
    larger product, so that halves of a weight take half its time each.
    """
    rank = np.asarray(rank, dtype=np.float64)
    width, height = shape.in_features, shape.out_features - shape.idle
    if storage is None:
        whole = rates.measured.part_seconds(tokens, width, height)
        dense = _one(rates, tokens, np.float64(width), np.float64(height), narrowest=width)
        return dense if np.isnan(whole) else np.float64(whole) + 0 * dense
    inner = storage.basis_width(rank, width)
    basis = _one(rates, tokens, inner, rank, narrowest=np.minimum(inner, rank))
    thin = np.minimum(rank, max(height, 1) / max(shape.inputs, 1))
    found = shape.inputs * basis + _one(rates, tokens, rank, np.float64(height), narrowest=thin)
    found = found + shape.lookups * _one(rates, tokens, rank, width, narrowest=rank)
    if storage.keeps_inputs:
        size = 2 * tokens * width * rates.element_size
        found = found + shape.inputs * size / rates.bytes_per_second(size)
    return found


def no_slower(
    rates: Rates, shape: Shape, rank: ArrayLike, storage: Storage, *, prompt: int = PREFILL
) -> NDArray[np.bool_]:
    """At which ranks a group's products take no longer than the dense ones, launches counted, for a
    prompt of so many tokens and for one token alike."""
    launch = rates.launch_seconds(compiled=True)
    # of each input one basis, and what gathers the inputs that are kept; lowering may take some out
    extra = launch * (shape.inputs * (1 + storage.keeps_inputs) + shape.lookups)
    faster = [
        product_seconds(rates, shape, rank, storage, tokens=tokens) + extra
        <= product_seconds(rates, shape, 0, None, tokens=tokens)
        for tokens in (prompt, DECODE)
    ]
    found: NDArray[np.bool_] = np.atleast_1d(np.logical_and(*faster))
    return found


def _one(
    rates: Rates, tokens: int, inner: ArrayLike, out: ArrayLike, *, narrowest: ArrayLike
) -> Floats:
    weights = np.asarray(inner, dtype=np.float64) * np.asarray(out, dtype=np.float64)
    arithmetic = 2 * tokens * weights / rates.flops_per_second(narrowest)
    traffic = weights * rates.element_size / rates.bytes_per_second(np.inf)
    measured = rates.measured.product_seconds(tokens, inner, out)
    found: Floats = np.where(np.isnan(measured), np.maximum(arithmetic, traffic), measured)
    return found


SIDE_UNIT = 10**9
"""What :func:`time_shares` counts in: parts of the dense model's time."""


def time_shares(
    rates: Rates,
    shape: Shape,
    rank: ArrayLike,
    storage: Storage | None,
    dense_seconds: Sequence[float],
    *,
    prompt: int = PREFILL,
) -> NDArray[np.int64]:
    """A group's share of the dense model's time, the larger one of prefill and decode, in parts of
    :data:`SIDE_UNIT`. ``dense_seconds`` are those of all groups, see :func:`dense_seconds`;
    ``prompt`` is how many tokens prefill has.

    The sum of these over groups is at least the share of either step.
    """
    each = [
        product_seconds(rates, shape, rank, storage, tokens=tokens) / whole
        for tokens, whole in zip((prompt, DECODE), dense_seconds, strict=True)
    ]
    larger = np.atleast_1d(np.maximum(*each))
    found: NDArray[np.int64] = np.ceil(larger * SIDE_UNIT).astype(np.int64)
    return found


def dense_seconds(
    rates: Rates, shapes: Sequence[Shape], *, prompt: int = PREFILL
) -> tuple[float, float]:
    """Seconds of everything dense, at prefill of so many tokens and at decode."""
    prefill, decode = (
        sum(float(product_seconds(rates, s, 0, None, tokens=tokens)) for s in shapes)
        for tokens in (prompt, DECODE)
    )
    return prefill, decode


__all__ = [
    "DECODE",
    "PREFILL",
    "SIDE_UNIT",
    "Forecast",
    "dense_seconds",
    "forecasts",
    "linears_of",
    "no_slower",
    "product_seconds",
    "time_shares",
    "without_linears",
]
