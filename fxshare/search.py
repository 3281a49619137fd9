"""A small search over plans, judged by the measured loss on held-back calibration data.

Far from dense a quadratic model says little, and by how much is not known beforehand. So a few
plans are made (with a floor under every rank, blended with uniform ranks, with same-input types
merged, with statistics measured again on a half-compressed model), each is tried on data that the
statistics have not seen, and the best is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxshare.capture import Call, Captured, quiet
from fxshare.capture.call import holds_tensor
from fxshare.errors import FactoriseError, PlanError
from fxshare.losses import Loss, default_loss, next_token_logits
from fxshare.numerics import float_leaves
from fxshare.planned import (
    GroupFactors,
    Options,
    factorise_group,
    groups_of,
    make_problem,
    nodes_of,
    quadratic_loss,
    refitted,
    shape_of,
)
from fxshare.planner.problem import Node, Problem
from fxshare.planner.solve import Choice, Solution, solve
from fxshare.plans import Group, Site
from fxshare.progress import track
from fxshare.sites import substitute
from fxshare.spectra import SliceStatistics, Spectra
from passes.graph import ModuleT, structure_copy

Effort = Literal["off", "quick", "thorough"]


@dataclass(frozen=True)
class Trial:
    """One way to plan."""

    name: str
    strategy: str = "layers"
    floor: float = 0.0
    """Least share of every group's dense cost, as a share of the budget's."""
    blend: float = 0.0
    """How far ranks are drawn towards uniform ones; 1 is uniform."""
    merge: bool = False
    """Whether types that read one activation may share a basis."""
    loss_aware: bool = True
    """Whether the gradient statistics are used; without them errors of activations count."""


@dataclass(frozen=True)
class Tried:
    """A trial's outcome. ``measured`` is the loss increase per token on the held-back data."""

    trial: str
    predicted: float
    measured: float
    cost: int
    groups: int
    seconds: float


def trials(effort: Effort, *, mergeable: bool) -> list[Trial]:
    """The trials of each effort; the first is the plain optimum of the quadratic model."""
    first = Trial("planned")
    if effort == "off":
        return [first]
    found = [
        first,
        Trial("floor 0.3", floor=0.3),
        Trial("floor 0.6", floor=0.6),
        Trial("blend 0.5", blend=0.5),
        Trial("uniform", strategy="separate", blend=1.0),
        Trial("uniform, activation error", strategy="separate", blend=1.0, loss_aware=False),
    ]
    if mergeable:
        found.append(Trial("same input merged", strategy="same_input", merge=True))
    if effort == "thorough":
        found += [
            Trial("floor 0.15", floor=0.15),
            Trial("floor 0.8", floor=0.8),
            Trial("blend 0.25", blend=0.25),
            Trial("blend 0.75", blend=0.75),
            Trial("floor 0.3, blend 0.25", floor=0.3, blend=0.25),
        ]
        if mergeable:
            found.append(
                Trial("same input merged, floor 0.3", strategy="same_input", merge=True, floor=0.3)
            )
    return found


class Judge:
    """Measures the loss of a substitution of weights on held-back calls.

    Runs the captured graph (or a copy of the model at module granularity) in which the sites'
    weights are replaced by dense ones of the same function as the plan's. ``tokens`` is how many
    the calls have, counted as the statistics count them: predicted and measured are then in one
    unit.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        sites: Sequence[Site],
        calls: Sequence[tuple[Call, object]],
        *,
        tokens: int,
        loss: Loss | None = None,
    ) -> None:
        source: nn.Module = model if captured.front_end == "modules" else captured.graph
        self._source = source
        self._whole_call = captured.front_end == "modules"
        self._sites = tuple(sites)
        self._calls = list(calls)
        self._loss = loss
        self.tokens = tokens
        self._dense: dict[int, list[Tensor]] = {}
        self.base = self._run(structure_copy(source))

    @property
    def is_distance(self) -> bool:
        """Whether the loss is the distance to the dense output, which has no slope at zero."""
        return bool(self._dense)

    def __call__(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> float:
        """Loss per token above the dense model's; infinite where it is not finite."""
        value = self._run(substituted(self._source, self._sites, weights, biases))
        return value - self.base if math.isfinite(value) else math.inf

    def _run(self, module: nn.Module) -> float:
        for m in module.modules():
            m.training = False
        total = 0.0
        with quiet():
            for number, (call, batch) in enumerate(self._calls):
                # a graph has no inputs but tensors: the others are constants in it
                given = {k: v for k, v in call.items() if self._whole_call or holds_tensor(v)}
                total += self._lost(number, module(**given), call, batch)
        return total / max(self.tokens, 1)

    def _lost(self, number: int, output: object, call: Call, batch: object) -> float:
        if self._loss is not None:
            return float(self._loss(output, batch))
        if next_token_logits(output, call) is not None:
            return float(default_loss(output, call)[0])
        # the output's energy itself falls with everything that is left out, down to zero where
        # nothing is left: what counts is that of the distance to the dense output
        leaves = [leaf for _, leaf in float_leaves(output)]
        dense = self._dense.setdefault(number, leaves)
        gaps = [(a.double() - b.double()).pow(2).sum() for a, b in zip(leaves, dense, strict=True)]
        return 0.5 * float(torch.stack(gaps).sum())


def slope(search: Search, plan: Planned, judge: Judge, *, step: float = 0.25) -> float:
    """The first-order part of a plan's loss increase: the mean gradient along its change of the
    weights, as a central difference at ``± step`` of that change.

    The planner's quadratic model has no such part, since it vanishes where training has converged
    on the calibration data. Where the plan changes little, the slope is most of what it loses.
    """
    weights, biases = search.dense(plan.factors)

    def at(share: float) -> float:
        moved = []
        for new, old in ((weights, search.weights), (biases, search.biases)):
            moved.append({k: v.lerp(old[k].to(v), 1 - share) for k, v in new.items()})
        return judge(moved[0], moved[1])

    return (at(step) - at(-step)) / (2 * step)


def substituted(
    source: ModuleT,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> ModuleT:
    """A copy of a module in which sites have other weights ``(out, in)`` and biases ``(out,)``."""
    copy = structure_copy(source)
    substitute(copy, sites, weights, biases)
    return copy


@dataclass(eq=False)
class Planned:
    """A plan that was tried: its groups, its factors, and what it was predicted to lose."""

    solution: Solution
    groups: tuple[Group, ...]
    factors: dict[str, GroupFactors]
    trial: Trial
    refitted: bool
    measured: float = math.nan
    predicted: float = math.nan
    """In the model's loss, whatever the ranks were chosen by."""
    bound: float = 0.0
    spectra: Spectra | None = None


@dataclass(eq=False)
class Search:
    """Everything that trials share. ``budget`` is in the options' unit."""

    sites: tuple[Site, ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    options: Options
    budget: float
    judge: Judge | None
    refit: bool | None = None
    bias: bool = True
    relative_floor: float = 1e-8
    cache: Path | None = None
    sketch: int | None = None
    tried: list[Tried] = field(default_factory=list)
    # by the identity of the statistics, which the loss-aware spectra keep alive
    _known: dict[int, dict[bool, Spectra]] = field(default_factory=dict)

    def run(
        self, slices: Mapping[str, SliceStatistics], todo: Sequence[Trial], *, label: str = ""
    ) -> Planned:
        """Try every trial on these statistics and return the best."""
        spectra = self._spectra(slices)
        best: Planned | None = None
        failures: list[str] = []
        known: dict[object, Planned] = {}
        bound = 0.0
        for trial in track(list(todo), f"searching{label}", total=len(todo)):
            start = time.perf_counter()
            try:
                one = self._plan(trial, spectra[trial.loss_aware])
                twin = known.setdefault(_signature(one), one)
                if twin is one:
                    self._realise(one)
                    _price(one, slices)
                else:  # the trial led to a plan that was tried already
                    one.factors, one.refitted = twin.factors, twin.refitted
                    one.measured, one.predicted = twin.measured, twin.predicted
                    one.groups = twin.groups
            except (PlanError, FactoriseError) as error:
                # a floor above the budget, or one that asks for ranks which the weights lack
                failures.append(f"{trial.name}: {error}")
                continue
            self.tried.append(
                Tried(
                    trial.name + label,
                    one.predicted,
                    one.measured,
                    one.solution.cost,
                    len(one.groups),
                    time.perf_counter() - start,
                )
            )
            # ranks chosen by activation error have no bound in the model's loss: the last one holds
            one.bound = one.solution.bound if trial.loss_aware else bound
            bound = one.bound
            if best is None or one.measured < best.measured:
                best = one
        if best is None:
            raise PlanError("; ".join(failures))
        return best

    def _spectra(self, slices: Mapping[str, SliceStatistics]) -> dict[bool, Spectra]:
        """Loss-aware spectra and those of activation error; runs on the same statistics share
        them, because the spectra are most of what planning costs."""
        if id(slices) not in self._known:
            plain = {name: replace(one, moment_OO=None) for name, one in slices.items()}
            self._known[id(slices)] = {
                aware: Spectra(
                    slices if aware else plain,
                    relative_floor=self.relative_floor,
                    cache=self.cache,
                    sketch=self.sketch,
                )
                for aware in (True, False)
            }
        return self._known[id(slices)]

    def _plan(self, trial: Trial, spectra: Spectra) -> Planned:
        nodes = nodes_of(self.sites, spectra.slices)
        dense = sum(_dense_cost(nodes, name, self.options) for name in nodes)
        share = self.budget / dense
        options = replace(
            self.options,
            floor=max(self.options.floor, trial.floor * share),
            may_share=self.options.may_share if not trial.merge else _same_input_types(nodes),
        )
        problem = make_problem(nodes, spectra, options)
        solution = solve(problem, self.budget, strategy=trial.strategy)
        if trial.blend:
            solution = blend(solution, problem, trial.blend, share, options)
        groups = groups_of(solution, nodes)
        return Planned(solution, groups, {}, trial, False, spectra=spectra)

    def dense_cost(self, planned: Planned) -> int:
        """What everything dense would cost, in the options' unit."""
        assert planned.spectra is not None
        nodes = nodes_of(self.sites, planned.spectra.slices)
        return sum(_dense_cost(nodes, name, self.options) for name in nodes)

    def _realise(self, one: Planned) -> None:
        """Factorise, with and without the refits that are left to measurement, and measure."""
        assert one.spectra is not None
        plain = {
            g.name: factorise_group(g, one.spectra, refit=False, bias=self.bias) for g in one.groups
        }
        best = math.inf
        # with one input a coefficient is fitted to it already
        several = any(_inputs(g, one.spectra) > 1 for g in one.groups)
        undecided = self.refit is None and self.judge is not None and several
        for refit in (True, False) if undecided else (self.refit is not False,):
            factors = plain
            if refit:
                factors = {
                    name: refitted(f, one.spectra, bias=self.bias) for name, f in plain.items()
                }
            measured = math.nan
            if self.judge is not None:
                measured = self.judge(*self.dense(factors))
            if not one.factors or measured < best:
                one.factors, one.measured, one.refitted = factors, measured, refit
                best = measured

    def dense(
        self, factors: Mapping[str, GroupFactors]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sites' weights multiplied out, and their shifted biases."""
        products = {
            name: (f.product(name), f.bias_shift.get(name))
            for f in factors.values()
            for name in f.group.slices
        }
        weights: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}
        for site in self.sites:
            if not any(s.name in products for s in site.slices):
                continue
            rows, moved = [], []
            for s in site.slices:
                product, shift = products.get(s.name, (None, None))
                own = self.weights[site.name][s.start : s.stop].double()
                rows.append(own if product is None else product)
                moved.append(own.new_zeros(s.out_features) if shift is None else shift)
            weights[site.name] = torch.cat(rows)
            if any(products.get(s.name, (None, None))[1] is not None for s in site.slices):
                shifts[site.name] = self.biases[site.name].double() + torch.cat(moved)
        return weights, shifts


def _inputs(group: Group, spectra: Spectra) -> int:
    return len({spectra.slices[name].input for name in group.slices})


def _price(one: Planned, slices: Mapping[str, SliceStatistics]) -> None:
    """Give a plan its predicted loss; where the ranks were chosen by activation error, the groups'
    losses are measured in the loss-aware metric, on the factors themselves."""
    if one.trial.loss_aware:
        one.predicted = one.solution.loss
        return
    groups = []
    for group in one.groups:
        factors = one.factors[group.name]
        lost = sum(quadratic_loss(slices[name], factors.product(name)) for name in group.slices)
        groups.append(group.model_copy(update={"loss": lost}))
    one.groups = tuple(groups)
    one.predicted = sum(group.loss or 0.0 for group in groups)


def _signature(one: Planned) -> object:
    groups = frozenset((g.slices, g.rank, g.storage) for g in one.groups)
    return one.trial.loss_aware, groups


def _dense_cost(nodes: Mapping[str, Node], name: str, options: Options) -> int:
    shape = shape_of(nodes, frozenset({name}))
    if options.unit == "numbers":
        return shape.dense_numbers
    if options.unit == "bytes":
        return shape.dense_numbers * options.element_size
    return shape.dense_flops


def _same_input_types(nodes: Mapping[str, Node]) -> tuple[frozenset[str], ...]:
    by_input: dict[object, set[str]] = {}
    for node in nodes.values():
        by_input.setdefault(node.input, set()).add(node.type)
    return tuple({frozenset(types) for types in by_input.values() if len(types) > 1})


def blend(
    solution: Solution, problem: Problem, share: float, kept: float, options: Options
) -> Solution:
    """Draw every group's cost towards ``kept`` of its dense cost: ``(1 − share) · planned + share ·
    uniform``, never above the budget."""
    choices = []
    for choice in solution.choices:
        curve = choice.candidate.curve
        # not the curve's last cost: under a ceiling that is not dense
        dense = sum(_dense_cost(problem.nodes, n, options) for n in choice.candidate.slices)
        wanted = (1 - share) * choice.cost + share * kept * dense
        fits = np.flatnonzero(curve.cost <= wanted)
        if len(fits):
            best = fits[np.lexsort((curve.cost[fits], curve.loss[fits]))[0]]
            choices.append(Choice(choice.candidate, int(best)))
        else:
            choices.append(Choice(choice.candidate, int(curve.hull[0])))
    blended = replace(solution, choices=tuple(choices))
    if blended.cost > solution.budget:
        raise PlanError(
            f"blended ranks cost {blended.cost:,}, more than the budget {solution.budget:,.0f}"
        )
    if problem.side_limit is not None and blended.side > problem.side_limit:
        raise PlanError(
            f"blended ranks take {blended.side:,} of the second limit's unit, more than "
            f"{problem.side_limit:,.0f}"
        )
    return blended
