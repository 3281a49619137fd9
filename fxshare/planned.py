"""The planned mode: statistics in, a plan with predicted loss out; and its factors.

Joins the pure planner (:mod:`fxshare.planner`) to tensors: spectra price the candidates, the chosen
groups are factorised in the metric they were priced in, refitted, and pivoted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxshare.cost_model import SIDE_UNIT, Rates, dense_seconds, time_shares
from fxshare.errors import FactoriseError, PlanError
from fxshare.pivoting import Pivoted, pivot
from fxshare.planner.cost import Ints, Shape, Storage, flops, numbers, ranks, weights_bytes
from fxshare.planner.curve import DENSE, Curve, restrict
from fxshare.planner.problem import Node, Part, Problem
from fxshare.planner.solve import Choice, Solution, sweep
from fxshare.planning import named_apart
from fxshare.plans import Group, Site
from fxshare.spectra import SliceStatistics, Spectra
from fxshare.statistics import Statistics

Unit = Literal["numbers", "bytes", "flops"]


@dataclass(frozen=True)
class Options:
    """What a planning problem allows. ``floor`` and ``ceiling`` are shares of a group's dense cost;
    ``flops_kept`` bounds the plan's operations by that share of the dense ones."""

    unit: Unit = "numbers"
    storages: tuple[Storage, ...] = ("plain", "pivoted")
    element_size: int = 4
    max_group: int | None = None
    rank_multiple: int | None = None
    floor: float = 0.0
    ceiling: float = 1.0
    flops_kept: float | None = None
    time_kept: float | None = None
    """Bounds the predicted time by that share of the dense one; needs ``rates``."""
    rates: Rates | None = None
    keep_dense: frozenset[int] = frozenset()
    may_share: tuple[frozenset[str], ...] = ()
    tie: tuple[Part, ...] = ()


def slice_statistics(
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    *,
    centred: bool = True,
) -> dict[str, SliceStatistics]:
    """Statistics per slice. With ``centred`` a site that has a bias is judged by the covariance of
    its input: the mean's part of the error goes into the bias."""
    found = {}
    grams: dict[object, Tensor] = {}
    for site in sites:
        # what is looked up gets no bias that could take up a mean
        biased = centred and site.bias and not site.lookups
        key = (statistics.key([site.name]), biased)
        mean = statistics.mean(site.name) if biased else None
        if key not in grams:
            gram = statistics.gram(site.name)
            grams[key] = gram if mean is None else gram - torch.outer(mean, mean)
        # losses are per token: a linear called twice a token counts twice, an expert that sees a
        # tenth of the tokens a tenth
        rows = statistics.tokens_of(site.name) / max(statistics.tokens, 1)
        for s in site.slices:
            moment = statistics.moment(s.name, site.name) if statistics.gradients else None
            found[s.name] = SliceStatistics(
                weight_OI=weights[site.name][s.start : s.stop],
                gram_II=grams[key],
                moment_OO=None if moment is None else moment if rows == 1 else moment * rows,
                input=key,
                mean_I=mean,
            )
    return found


def nodes_of(sites: Sequence[Site], slices: Mapping[str, SliceStatistics]) -> dict[str, Node]:
    """The planner's nodes. Sites without a layer number get one of their own, below all layers."""
    found = {}
    for number, site in enumerate(sites):
        layer = -1 - number if site.layer is None else site.layer
        for s in site.slices:
            found[s.name] = Node(
                name=s.name,
                site=site.name,
                type=site.type,
                label=s.label,
                layer=layer,
                head=s.head,
                in_features=site.in_features,
                out_features=s.out_features,
                input=slices[s.name].input,
                lookups=len(site.lookups),
                multiplied=bool(site.calls),
            )
    return found


def shape_of(nodes: Mapping[str, Node], part: Part) -> Shape:
    """The shape of a group: each site reads the basis with its input, once."""
    members = [nodes[name] for name in part]
    return Shape(
        members[0].in_features,
        sum(node.out_features for node in members),
        len({node.input for node in members if node.multiplied}),
        sum(node.lookups for node in members),
        sum(node.out_features for node in members if not node.multiplied),
    )


def make_problem(nodes: Mapping[str, Node], spectra: Spectra, options: Options) -> Problem:
    """The partition problem with curves from spectra.

    The curves' second unit is FLOPs, or with ``time_kept`` parts of the dense time.
    """
    alone = [shape_of(nodes, frozenset({name})) for name in nodes]
    side, limit = _second_unit(alone, options)

    def curve(part: Part) -> Curve:
        shape = shape_of(nodes, part)
        rank = ranks(shape, options.rank_multiple)
        dense = _cost(shape, np.array([0]), "plain", options, dense=True)
        costs, losses, chosen, sides = [], [], [], []
        if not any(nodes[name].layer in options.keep_dense for name in part):
            tails = spectra.tails(part)
            for storage in ("plain",) if shape.lookups else options.storages:
                cost = _cost(shape, rank, storage, options)
                keep = cost < dense[0]
                costs.append(cost[keep])
                losses.append(tails[rank[keep]])
                chosen.append(rank[keep] * 2 + (storage == "pivoted"))
                sides.append(side(shape, rank[keep], storage))
        costs.append(dense)
        losses.append(np.zeros(1))
        chosen.append(np.array([DENSE]))
        sides.append(side(shape, np.array([0]), None))
        whole = Curve(*(np.concatenate(each) for each in (costs, losses, chosen, sides)))
        ceiling = None if options.ceiling >= 1.0 else options.ceiling * float(dense[0])
        return restrict(whole, least=options.floor * float(dense[0]), most=ceiling)

    return Problem(
        nodes,
        curve,
        may_share=options.may_share,
        max_group=options.max_group,
        tie=options.tie,
        side_limit=limit,
    )


Side = Callable[[Shape, Ints, "Storage | None"], Ints]
"""The cost of a group in the second unit at ranks; dense where there is no storage."""


def _second_unit(alone: Sequence[Shape], options: Options) -> tuple[Side, float | None]:
    """What the plan is bounded in beside its budget, and the bound; ``alone`` are the shapes of all
    slices."""
    if options.time_kept is None:
        limit = options.flops_kept
        whole = sum(shape.dense_flops for shape in alone)
        return _operations, None if limit is None else limit * whole
    rates = options.rates
    assert rates is not None
    whole_seconds = dense_seconds(rates, alone)

    def share(shape: Shape, rank: Ints, storage: Storage | None) -> Ints:
        return time_shares(rates, shape, rank, storage, whole_seconds)

    return share, options.time_kept * SIDE_UNIT


def _operations(shape: Shape, rank: Ints, storage: Storage | None) -> Ints:
    if storage is None:
        return np.array([shape.dense_flops])
    return flops(shape, rank, storage)


def _cost(
    shape: Shape,
    rank: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    storage: Storage,
    options: Options,
    *,
    dense: bool = False,
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    if options.unit == "numbers":
        return np.array([shape.dense_numbers]) if dense else numbers(shape, rank, storage)
    if options.unit == "bytes":
        size = options.element_size
        if dense:
            return np.array([shape.dense_numbers * size])
        return weights_bytes(shape, rank, storage, size)
    return np.array([shape.dense_flops]) if dense else flops(shape, rank, storage)


def rank_of(choice: Choice) -> tuple[int, Storage]:
    """Rank and storage that an option of a basis candidate stands for."""
    return choice.rank // 2, "pivoted" if choice.rank % 2 else "plain"


def groups_of(solution: Solution, nodes: Mapping[str, Node]) -> tuple[Group, ...]:
    """The plan's groups; slices that stay dense are in none."""
    groups = []
    for choice in solution.choices:
        if choice.rank == DENSE:
            continue
        rank, storage = rank_of(choice)
        part = choice.candidate.slices
        members = sorted((nodes[n] for n in part), key=lambda n: (n.layer, n.site, n.name))
        shape = shape_of(nodes, part)
        types = list(dict.fromkeys(n.type for n in members))
        labels = list(dict.fromkeys(n.label for n in members))
        layers = tuple(sorted({n.layer for n in members if n.layer >= 0}))
        where = f"{layers[0]}_{layers[-1]}" if layers else members[0].site
        name = "_".join(filter(None, ["basis", *types, *(labels[:4]), where]))
        groups.append(
            Group(
                name=re.sub(r"\W", "_", name),
                type="+".join(types),
                label="+".join(labels),
                layers=layers,
                slices=tuple(n.name for n in members),
                in_features=shape.in_features,
                out_features=shape.out_features,
                rank=rank,
                storage=storage,
                loss=choice.loss,
            )
        )
    return named_apart(groups)


@dataclass(frozen=True)
class Alternative:
    """The best that a dense slice could be instead, at the plan's price."""

    rank: int
    storage: Storage
    saved: int
    """Units of the budget."""
    loss: float


def alternatives(
    problem: Problem, names: Sequence[str], price: float
) -> dict[str, Alternative | None]:
    """For slices by name what each would be if it could not stay dense: the option of least
    ``loss + price · cost``. None where no option is left."""
    found: dict[str, Alternative | None] = {}
    for name in names:
        curve = problem.candidate(frozenset({name})).curve
        low = np.flatnonzero(curve.rank != DENSE)
        dense = curve.cost[curve.rank == DENSE]
        if not len(low) or not len(dense):
            found[name] = None
            continue
        at = int(low[np.argmin(curve.loss[low] + price * curve.cost[low])])
        rank = int(curve.rank[at])
        found[name] = Alternative(
            rank // 2,
            "pivoted" if rank % 2 else "plain",
            int(dense[0] - curve.cost[at]),
            float(curve.loss[at]),
        )
    return found


@dataclass(frozen=True)
class SweepPoint:
    """A plan of a sweep. ``budget`` and ``kept`` are shares of the dense cost: what was allowed,
    and what the plan takes of it. ``bound`` is the dual bound, 0 where there is none."""

    budget: float
    kept: float
    loss: float
    bound: float
    bases: int


@dataclass(frozen=True)
class Sweep:
    """Predicted loss against budget, all on one set of statistics and before any search.

    ``uniform`` gives every slice a basis of its own and the same share of its dense cost, as far as
    floors and layers kept dense allow; it keeps no bound on FLOPs.
    """

    unit: Unit
    dense: int
    """Cost of everything dense, in the unit."""
    loss_name: str
    planned: tuple[SweepPoint, ...]
    uniform: tuple[SweepPoint, ...]


def sweep_budgets(
    problem: Problem, shares: Sequence[float], options: Options, *, strategy: str, loss_name: str
) -> Sweep:
    """Plans for several budgets, each a share of the dense cost, over one collection of
    partitions; nothing is factorised. Budgets below the cheapest plan have no point."""
    parts = problem.singletons()
    each = {
        part: int(
            _cost(shape_of(problem.nodes, part), np.array([0]), "plain", options, dense=True)[0]
        )
        for part in parts
    }
    dense = sum(each.values())
    todo = sorted(shares)
    solutions: list[Solution] = []
    while todo and not solutions:
        try:
            solutions = sweep(problem, [share * dense for share in todo], strategy=strategy)
        except PlanError:
            if len(todo) == 1:
                raise
            todo = todo[1:]
    planned = tuple(
        SweepPoint(
            share,
            one.cost / dense,
            one.loss,
            one.bound,
            sum(choice.rank != DENSE for choice in one.choices),
        )
        for share, one in zip(todo, solutions, strict=True)
    )
    uniform = []
    for share in todo:
        cost, loss, bases = 0, 0.0, 0
        for part in parts:
            curve = problem.candidate(part).curve
            fits = np.flatnonzero(curve.cost <= share * each[part])
            at = int(np.argmin(curve.cost))  # what must stay dense does, whatever its share
            if len(fits):
                at = int(fits[np.lexsort((curve.cost[fits], curve.loss[fits]))[0]])
            cost, loss = cost + int(curve.cost[at]), loss + float(curve.loss[at])
            bases += int(curve.rank[at] != DENSE)
        uniform.append(SweepPoint(share, cost / dense, loss, 0.0, bases))
    return Sweep(options.unit, dense, loss_name, planned, tuple(uniform))


@dataclass(eq=False)
class GroupFactors:
    """The factors of one group in float64: ``weight_i ≈ coefficients[i] @ basis_RI``."""

    group: Group
    basis_RI: Tensor
    coefficients: dict[str, Tensor]
    floored: int
    lost: float
    """Predicted loss increase, from the spectrum."""
    total: float
    floor: float = 0.0
    """What the whitening raised small eigenvalues to."""
    bias_shift: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def pivoted(self) -> Pivoted | None:
        """The pivoted form of the basis where the group is stored so; made when first asked for,
        because most plans of a search are never stored."""
        if self.group.storage != "pivoted":
            return None
        try:
            return pivot(self.basis_RI)
        except FactoriseError as error:
            raise FactoriseError(f"group {self.group.name!r}: {error}") from error

    def product(self, name: str) -> Tensor:
        """The weight that a slice is replaced by."""
        return self.coefficients[name] @ self.basis_RI


def factorise_group(
    group: Group,
    spectra: Spectra,
    *,
    refit: bool = True,
    bias: bool = True,
) -> GroupFactors:
    """Factorise one planned group in the metric it was priced in.

    Minimises ``½ Σ_i tr(A_i (W_i − C_i B) G (W_i − C_i B)ᵀ)``; with ``refit`` each slice's
    coefficient is then fitted to its own Gram, ``C_i = W_i G_i Bᵀ (B G_i Bᵀ)⁻¹``, which never
    raises its error; with ``bias`` the mean of what is lost is returned as a shift of the bias.
    """
    names = group.slices
    whitening = spectra.whitening(tuple(sorted(names)))
    try:
        factors = spectra.factors(names, group.rank)
    except FactoriseError as error:
        raise FactoriseError(f"group {group.name!r}: {error}") from error
    coefficients = {}
    for name, coefficient in zip(names, factors.coefficients, strict=True):
        root = spectra.root(name)
        coefficients[name] = coefficient if root is None else root.undo(coefficient)
    made = GroupFactors(
        group,
        factors.basis_RI,
        coefficients,
        whitening.floored,
        0.5 * factors.lost,
        0.5 * factors.total,
        whitening.floor,
    )
    if refit:
        return refitted(made, spectra, bias=bias)
    return replace(made, bias_shift=_shifts(made, spectra)) if bias else made


def quadratic_loss(one: SliceStatistics, product_OI: Tensor) -> float:
    """``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)`` of one slice under its own statistics."""
    gap = one.weight_OI.double() - product_OI
    left = one.times_moment(gap)
    return 0.5 * float((left @ one.gram_II.double() * gap).sum())


def refitted(factors: GroupFactors, spectra: Spectra, *, bias: bool = True) -> GroupFactors:
    """The factors with every coefficient fitted to its own slice's Gram."""
    coefficients = {
        name: _refit(spectra.slices[name], factors.basis_RI, coefficient, factors.floor)
        for name, coefficient in factors.coefficients.items()
    }
    made = replace(factors, coefficients=coefficients, bias_shift={})
    return replace(made, bias_shift=_shifts(made, spectra)) if bias else made


def _shifts(factors: GroupFactors, spectra: Spectra) -> dict[str, Tensor]:
    shifts = {}
    for name in factors.coefficients:
        one = spectra.slices[name]
        if one.mean_I is not None:
            shifts[name] = (one.weight_OI.double() - factors.product(name)) @ one.mean_I
    return shifts


def _refit(one: SliceStatistics, basis_RI: Tensor, coefficient: Tensor, floor: float) -> Tensor:
    gram = one.gram_II.double()
    projected = basis_RI @ gram
    inner = projected @ basis_RI.T
    # the damping that the whitening had, so that a singular Gram refits to where it started
    inner = inner + floor * (basis_RI @ basis_RI.T)
    right = one.weight_OI.double() @ (projected.T + floor * basis_RI.T)
    solved, info = torch.linalg.solve_ex(inner, right.T)
    refitted: Tensor = solved.T
    if int(info) or not bool(refitted.isfinite().all()):
        return coefficient
    return refitted
