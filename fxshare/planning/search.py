"""A small search over plans, judged by the measured loss on held-back calibration data.

Far from dense a quadratic model says little, and by how much is not known beforehand. So a few
plans are made (with a floor under every rank, blended with uniform ranks, with same-input types
merged, with statistics measured again on a half-compressed model), each is tried on data that the
statistics have not seen, and the best is kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fxshare.base.lazily import Lazily
from fxshare.base.progress import stage, track
from fxshare.errors import FactoriseError, PlanError
from fxshare.factors.factored import Factored
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.planning.blend import blend
from fxshare.planning.judge import Judge
from fxshare.planning.kinds.basis import groups_of, make_problem
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import Options, dense_cost
from fxshare.planning.solver.problem import Node
from fxshare.planning.solver.solve import Solution, solve
from fxshare.planning.trials import Trial, Tried
from fxshare.plans.plan import Group
from fxshare.sites.site import Site

_LOG = logging.getLogger(__name__)


def slope(search: Search, plan: Planned, judge: Judge, *, step: float = 0.25) -> float:
    """The first-order part of a plan's loss increase: the mean gradient along its change of the
    weights, as a central difference at ``± step`` of that change.

    The planner's quadratic model has no such part, since it vanishes where training has converged
    on the calibration data. Where the plan changes little, the slope is most of what it loses.
    """
    weights, biases = search.dense(plan.factors)

    def at(share: float) -> float:
        def between(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            def made(name: str) -> Tensor:
                moved = new[name]
                found: Tensor = moved.lerp(old[name].to(moved), 1 - share)
                return found

            return Lazily(tuple(new), made)

        # of a difference of two losses the dense model's is no part
        return judge.absolute(between(weights, search.weights), between(biases, search.biases))

    return (at(step) - at(-step)) / (2 * step)


@dataclass(eq=False)
class Planned:
    """A plan that was tried: its groups, its factors, and what it was predicted to lose."""

    solution: Solution
    groups: tuple[Group, ...]
    factors: Factored
    trial: Trial
    refitted: bool
    measured: float = math.nan
    predicted: float = math.nan
    """In the model's loss, whatever the ranks were chosen by."""
    bound: float = 0.0
    priced_bound: float = 0.0
    spectra: Spectra | None = None


SpectraByMetric = Mapping[bool, Spectra]
"""The loss-aware spectra of some statistics (True), and those of activation error."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best plan of some trials, and the outcomes of all that could be carried out."""

    best: Planned
    tried: tuple[Tried, ...]


@dataclass(frozen=True, eq=False)
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
    room: int = 1 << 30
    """Bytes for what is computed and may be asked for again."""

    def run(self, spectra: SpectraByMetric, todo: Sequence[Trial], *, label: str = "") -> Found:
        """Try every trial on the statistics of these spectra.

        Raises :class:`PlanError` with every trial's reason where none can be carried out.
        """
        with stage(f"plan: searching{label}", _LOG) as running:
            found = self._run(spectra, todo, label)
            running.found(f"best of {len(todo)}: {found.best.trial.name}")
        return found

    def _run(self, spectra: SpectraByMetric, todo: Sequence[Trial], label: str) -> Found:
        best: Planned | None = None
        tried: list[Tried] = []
        failures: list[str] = []
        known: dict[object, Planned] = {}
        bounds = 0.0, 0.0
        trials = track(list(todo), f"searching{label}", total=len(todo))
        for number, trial in enumerate(trials, 1):
            which = f"plan: trial {number} of {len(todo)}, {trial.name}{label}"
            start = time.perf_counter()
            try:
                one = self._plan(trial, spectra[trial.loss_aware])
                twin = known.get(_signature(one))
                if twin is None:
                    self._realise(one)
                    _price(one, spectra[True].slices)
                    known[_signature(one)] = one
                else:  # the trial led to a plan that was tried already, and is no better
                    one.refitted, one.groups = twin.refitted, twin.groups
                    one.measured, one.predicted = twin.measured, twin.predicted
            except (PlanError, FactoriseError) as error:
                # a floor above the budget, or one that asks for ranks which the weights lack
                failures.append(f"{trial.name}: {error}")
                _LOG.info("%s: no plan, %s", which, error)
                continue
            seconds = time.perf_counter() - start
            name, cost, groups = trial.name + label, one.solution.cost, len(one.groups)
            tried.append(Tried(name, one.predicted, one.measured, cost, groups, seconds))
            measured = "" if math.isnan(one.measured) else f", measured {one.measured:+.4g}"
            losses = f"predicted loss {one.predicted:+.4g}{measured}"
            _LOG.info("%s: %s, in %.1f s", which, losses, seconds)
            # ranks chosen by activation error have no bound in the model's loss: the last one holds
            if trial.loss_aware:
                bounds = one.solution.bound, one.solution.priced_bound
            one.bound, one.priced_bound = bounds
            worse: Planned | None = one
            if best is None or one.measured < best.measured:
                worse, best = best, one
            if worse is not None:
                worse.factors = replace(worse.factors, groups=())
        if best is None:
            raise PlanError("; ".join(failures))
        return Found(best, tuple(tried))

    def spectra(self, slices: Mapping[str, SliceStatistics]) -> SpectraByMetric:
        """Spectra of these statistics, to give to every :meth:`run` on them: they keep what they
        have computed, which is most of what planning costs."""
        plain = {name: one.unweighted() for name, one in slices.items()}
        both = {
            aware: Spectra(
                slices if aware else plain,
                relative_floor=self.relative_floor,
                cache=self.cache,
                sketch=self.sketch,
                # plans by activation error are one or two of a search
                room=self.room * 3 // 4 if aware else self.room // 4,
            )
            for aware in (True, False)
        }
        both[False].share_inputs(both[True])
        return both

    def _plan(self, trial: Trial, spectra: Spectra) -> Planned:
        nodes = nodes_of(self.sites, spectra.slices)
        dense = sum(dense_cost(nodes, name, self.options) for name in nodes)
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
        nothing = Factored((), spectra, refit=False, bias=self.bias)
        return Planned(solution, groups, nothing, trial, False, spectra=spectra)

    def dense_cost(self, planned: Planned) -> int:
        """What everything dense would cost, in the options' unit."""
        assert planned.spectra is not None
        nodes = nodes_of(self.sites, planned.spectra.slices)
        return sum(dense_cost(nodes, name, self.options) for name in nodes)

    def _realise(self, one: Planned) -> None:
        """Factorise, with and without the refits that are left to measurement, and measure."""
        assert one.spectra is not None
        # with one input a coefficient is fitted to it already
        several = any(_inputs(g, one.spectra) > 1 for g in one.groups)
        undecided = self.refit is None and self.judge is not None and several
        best = math.inf
        for refit in (True, False) if undecided else (self.refit is not False,):
            factors = Factored(one.groups, one.spectra, refit, self.bias)
            measured = math.nan
            if self.judge is not None:
                measured = self.judge(*self.dense(factors))
            if not one.factors or measured < best:
                one.factors, one.measured, one.refitted = factors, measured, refit
                best = measured

    def dense(self, factors: Factored) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The sites' weights multiplied out, in float32 at least, and their shifted biases; each is
        computed when it is asked for."""
        group_of = {name: group.name for group in factors.groups for name in group.slices}
        sites = {x.name: x for x in self.sites if any(s.name in group_of for s in x.slices)}

        def weight(site: str) -> Tensor:
            whole, rows = self.weights[site], []
            # the model's own matrix products are no finer
            dtype = torch.promote_types(whole.dtype, torch.float32)
            for s in sites[site].slices:
                if s.name in group_of:
                    rows.append(factors[group_of[s.name]].product(s.name, dtype))
                else:
                    rows.append(whole[s.start : s.stop].to(dtype))
            return rows[0] if len(rows) == 1 else torch.cat(rows)

        def bias(site: str) -> Tensor:
            shifts = []
            for s in sites[site].slices:
                made = factors[group_of[s.name]] if s.name in group_of else None
                shift = None if made is None else made.bias_shift.get(s.name)
                device = self.weights[site].device
                still = torch.zeros(s.out_features, dtype=torch.float64, device=device)
                shifts.append(still if shift is None else shift)
            return self.biases[site].double() + torch.cat(shifts)

        shifted = tuple(
            site.name for site in sites.values() if any(factors.shifts(s.name) for s in site.slices)
        )
        return Lazily(tuple(sites), weight), Lazily(shifted, bias)


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
        lost = sum(slices[name].quadratic_loss(factors.product(name)) for name in group.slices)
        groups.append(group.model_copy(update={"loss": lost}))
    one.groups = tuple(groups)
    one.predicted = sum(group.loss or 0.0 for group in groups)


def _signature(one: Planned) -> object:
    groups = frozenset((g.slices, g.rank, g.storage) for g in one.groups)
    return one.trial.loss_aware, groups


def _same_input_types(nodes: Mapping[str, Node]) -> tuple[frozenset[str], ...]:
    by_input: dict[object, set[str]] = {}
    for node in nodes.values():
        by_input.setdefault(node.input, set()).add(node.type)
    return tuple({frozenset(types) for types in by_input.values() if len(types) > 1})
