"""A small search over plans, judged by the measured loss on held-back calibration data.

Far from dense a quadratic model says little, and by how much is not known beforehand. So a few
plans are made (:mod:`fxshare.planning.trials`), each is tried on a part of the data that was held
back, the better half on all of it (Jamieson & Talwalkar 2016), and the best is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from fxshare.base.filed import Filed
from fxshare.base.memory import trim
from fxshare.base.processes import here
from fxshare.base.progress import stage, track
from fxshare.base.spent import part
from fxshare.errors import FactoriseError, PlanError
from fxshare.factors.entries import spectra_name
from fxshare.factors.factored import Factored
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.tails import unsure_by
from fxshare.planning.blend import blend
from fxshare.planning.finalists import Calls, best_of_each, decided, finalists
from fxshare.planning.judge import Candidate, Judge, Lost
from fxshare.planning.kinds.basis import (
    BasisOption,
    groups_of,
    make_problem,
    rounded_of,
    surely_priced,
)
from fxshare.planning.kinds.kind import BASIS, FoundPart, Kind, Scene
from fxshare.planning.kinds.named import entries_of, others_of
from fxshare.planning.made import CarriedOut, dense, stored_in
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import Options, dense_cost, widths_of
from fxshare.planning.planned import (
    Planned,
    better_half,
    inputs_of,
    outcome,
    price,
    said,
    signature,
)
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.solver.contenders import contenders
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.planning.solver.solve import solve
from fxshare.planning.trials import Among, Trial, Tried, is_far, is_outdone
from fxshare.planning.work import Work
from fxshare.sites.site import Site

_LOG = logging.getLogger(__name__)
_UNSURE = 0.1
"""Of what a plan is predicted to lose, how much float32 may leave untold."""


Problems: TypeAlias = dict[tuple[int, str, bool, Among], "Problem | None"]
SpectraByMetric = Mapping[bool, Spectra]
"""The loss-aware spectra of some statistics (True), and those of activation error."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best plan of some trials, and the outcomes of all that could be carried out."""

    best: Planned
    tried: tuple[Tried, ...]
    plans: tuple[tuple[str, Planned], ...] = ()  # those that differ, by their outcomes' names


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
    work: Work | None = None
    sketch: int | None = None
    kinds: tuple[Kind, ...] = ()  # those beside the basis
    parts: tuple[FoundPart, ...] = ()
    room: int = 1 << 30
    """Bytes for what is computed and may be asked for again."""
    exact: bool = False
    """Whether groups are priced in float64 although their weights are no finer than float32."""
    problems: Problems = field(default_factory=dict, repr=False)
    """What was solved on the spectra at hand; None where it had a floor."""
    priced: dict[int, RoundingPrice] = field(default_factory=dict, repr=False)
    """What few bits lose, on the spectra at hand."""
    contend: dict[tuple[str, bool, Among], Callable[[Part], bool]] = field(
        default_factory=dict, repr=False
    )
    """Which groups are priced, likewise; where there is none whichever the strategy asks for."""

    def run(self, spectra: SpectraByMetric, todo: Sequence[Trial], *, label: str = "") -> Found:
        """Try every trial on the statistics of these spectra.

        Raises :class:`PlanError` with every trial's reason where none can be carried out.
        """
        with stage(f"plan: searching{label}", _LOG) as running:
            found = self._run(spectra, todo, label)
            running.found(f"best of {len(todo)}: {found.best.trial.name}")
        return found

    def _run(self, spectra: SpectraByMetric, todo: Sequence[Trial], label: str) -> Found:
        found, failures, bounds = list[Planned](), list[str](), (0.0, 0.0)
        twins, known, behind = dict[int, Planned](), dict[object, Planned](), set[Among]()
        trials = track(list(todo), f"searching{label}", total=len(todo))
        for number, trial in enumerate(trials, 1):
            which = f"plan: trial {number} of {len(todo)}, {trial.name}{label}"
            start = time.perf_counter()
            if self.judge and is_outdone(
                trial, {one.trial: one.predicted for one in known.values()}
            ):
                _LOG.info("%s: left out, by the loss it is far worse than others", which)
                continue
            if trial.among in behind:
                continue
            try:
                one = self._plan(trial, spectra[trial.loss_aware])
                if self.judge and trial.alone and is_far(one.solution.loss, _losses(known)):
                    _LOG.info("%s: left out, it is predicted to lose far more", which)
                    behind.add(trial.among)
                    continue
                # a trial that led to a plan that was tried already is no better
                twin = known.get(signature(one))
                if twin is None:
                    self._try(one, spectra[True])
                    twin = known[signature(one)] = one
            except (PlanError, FactoriseError) as error:
                # a floor above the budget, or one that asks for ranks which the weights lack
                failures.append(f"{trial.name}: {error}")
                _LOG.info("%s: no plan, %s", which, error)
                if trial.alone and not trial.floor and not trial.blend:
                    behind.add(trial.among)
                continue
            measured = [other.measured for other in known.values()]
            if trial.alone and is_far(twin.measured, measured, tried=True):
                behind.add(trial.among)
            if twin is not one:
                twins[len(found)] = twin
            found.append(one)
            trim()
            one.seconds = time.perf_counter() - start
            _LOG.info("%s: %s, in %.1f s", which, said(twin), one.seconds)
            # ranks chosen by activation error have no bound in the model's loss: the last one holds
            if trial.loss_aware:
                bounds = one.solution.bound, one.solution.priced_bound
            one.bound, one.priced_bound = bounds
        if not found:
            slower = "; planner: {never_slower: false} lets bases be slower than dense"
            counted = f" (budgets are in {self.options.unit})"
            raise PlanError("; ".join(failures) + counted + slower * self.options.never_slower)
        plans = [one for at, one in enumerate(found) if at not in twins]
        better = better_half(plans)
        better += [one for one in best_of_each(plans) if one not in better]
        best = self._best(better, spectra[True])
        for at, twin in twins.items():
            found[at].take(twin)
        tried = tuple(outcome(one, label) for one in found)
        return Found(best, tried, tuple((one.trial.name + label, one) for one in plans))

    def _try(self, one: Planned, aware: Spectra) -> None:
        """Realise a plan, without the refit that is left to measurement, and measure it on the
        first share of the held-back data."""
        self._realise(one, refit=self.refit is not False and not self._is_undecided(one))
        if self.judge is not None:
            one.lost = self.judge.first(self.judged(one, self.judge))
        price(one, aware.slices)

    def _best(self, plans: Sequence[Planned], aware: Spectra) -> Planned:
        """The best of some plans that were tried, measured on all of the held-back data, with the
        refit where that is better on the first share."""
        if self.judge is None:
            return plans[0]
        for one in plans:
            start = time.perf_counter()
            refit, on = self._refit(one, self.judge) if self._is_undecided(one) else (None, None)
            if refit is not None:
                one.lost = refit
                price(one, aware.slices)
            if not self.judge.is_whole(one.lost):
                on = on or self.judged(one, self.judge)
                one.lost = self.judge.whole(on, one.lost)
            one.seconds += time.perf_counter() - start
            _LOG.info("plan: %s: %s", one.trial.name, said(one))
        return min(plans, key=lambda one: one.measured)

    def decided(self, best: Planned, plans: Sequence[Planned], fit: Calls) -> Planned:
        """The best of the plans of all rounds: where the best ones of several sets of kinds are
        near each other, as :func:`fxshare.planning.finalists.decided` says."""
        last = finalists(plans)
        if self.judge is None or len(last) < 2:
            return best
        judge = self.judge
        kept = decided(last, Calls(judge, judge.calls), fit, self.judged)
        judge.forget()
        fit.judge.forget()
        return kept

    def _refit(self, one: Planned, judge: Judge) -> tuple[Lost | None, Candidate | None]:
        """Refit a plan where that is better on the first share: what it loses then, and the model
        with its weights; else None, twice."""
        self._realise(one, refit=True)
        on = self.judged(one, judge)
        lost = judge.first(on)
        if lost.per_token <= one.measured:
            return lost, on
        self._realise(one, refit=False)
        return None, None

    def judged(self, one: Planned, judge: Judge) -> Candidate:
        """The model with the weights of a plan."""
        return judge.substituted(*self.dense(one), one.what)

    def spectra(self, slices: Mapping[str, SliceStatistics], number: int = 0) -> SpectraByMetric:
        """Spectra of the statistics of a round, to give to every :meth:`run` on them: they keep
        what they have computed, which is most of what planning costs."""
        plain = {name: one.unweighted() for name, one in slices.items()}
        how = self.bias, self.exact
        both = {
            aware: Spectra(
                slices if aware else plain,
                relative_floor=self.relative_floor,
                cache=self.cache if self.work is None else self.work.spectra(number),
                name="" if self.work is None else spectra_name(number, aware, *how),
                sketch=self.sketch,
                filed=None if self._dtype == torch.float64 else Filed(),
                dtype=torch.float64 if self.exact else self._dtype,
                stored=stored_in(self.weights),
                # plans by activation error are one or two of a search
                room=self.room * 3 // 4 if aware else self.room // 4,
            )
            for aware in (True, False)
        }
        both[False].share_inputs(both[True])
        return both

    def tells(self, trial: Trial, spectra: Spectra) -> bool:
        """Whether what the groups of a plan lose is told in the dtype that they are priced in: near
        dense it may be less than float32 leaves of a spectrum's largest eigenvalue, and ranks
        that lose differently then have one price, nothing."""
        if spectra.dtype == torch.float64:
            return True
        try:
            solution = self._plan(trial, spectra).solution
        except (PlanError, FactoriseError):  # which the search says of every trial
            return True
        groups = (one for one in solution.choices if isinstance(one.meaning, BasisOption))
        tails = (spectra.tails(one.candidate.slices) for one in groups)
        return sum(unsure_by(one, spectra.dtype) for one in tails) <= _UNSURE * solution.loss

    @part("solve")
    def _plan(self, trial: Trial, spectra: Spectra) -> Planned:
        nodes = nodes_of(self.sites, spectra.slices)
        dense = sum(dense_cost(nodes, name, self.options) for name in nodes)
        share = self.budget / dense
        options = replace(
            self.options,
            bits=widths_of(trial.bits) or self.options.bits,
            shares_bases=self.options.shares_bases and BASIS not in trial.without,
            floor=max(self.options.floor, trial.floor * share),
            may_share=self.options.may_share if not trial.merge else _same_input_types(nodes),
        )
        problem = self._problem(spectra, options, trial.strategy, trial.among)
        solution = solve(problem, self.budget, strategy=trial.strategy)
        if trial.blend:
            solution = blend(solution, problem, trial.blend, share, options)
        groups = groups_of(solution, nodes)
        nothing = Factored((), spectra, refit=False, bias=self.bias)
        known = {site.name: site for site in self.sites}
        entries = entries_of(self.kinds, solution)
        units = CarriedOut(entries, spectra, self.kinds, known, self.bias) if entries else None
        rounded = rounded_of(solution)
        return Planned(solution, groups, nothing, trial, False, units, rounded, spectra=spectra)

    def _problem(
        self, spectra: Spectra, options: Options, strategy: str, among: Among = ((), False, ())
    ) -> Problem:
        """The problem of a strategy. Without a floor of a trial's own it is kept with what it has
        collected: trials that differ in blending only, and other budgets, solve it once. With one
        the groups are those that were priced for the first trial of that strategy."""
        nodes = nodes_of(self.sites, spectra.slices)
        of = strategy, options.may_share != self.options.may_share, among
        key = id(spectra), *of
        rounding = self._rounding(spectra, nodes)
        known: Callable[[Part], bool] | None = self.contend.get(of)
        if options.floor != self.options.floor:
            if key in self.problems:
                made = make_problem(
                    nodes, spectra, options, known=spectra.is_computed, rounding=rounding
                )
                return self._beside(made, spectra, options, among)
            self.problems[key] = None
            made = make_problem(nodes, spectra, options, known=known, rounding=rounding)
            made = self._beside(made, spectra, options, among)
            return _shared(made, spectra, options, strategy)
        found = self.problems.get(key)
        if found is None:
            made = make_problem(nodes, spectra, options, known=known, rounding=rounding)
            made = self._beside(made, spectra, options, among)
            found = self.problems[key] = _shared(made, spectra, options, strategy)
        return found

    def _beside(
        self, problem: Problem, spectra: Spectra, options: Options, among: Among
    ) -> Problem:
        """The problem with candidates of the kinds that a trial does not do without."""
        without, insists, _ = among
        kinds = [kind for kind in self.kinds if kind.name not in without]
        if not kinds:
            return problem
        rounding = self._rounding(spectra, problem.nodes)
        scene = Scene(self.parts, problem.nodes, spectra, options, rounding)
        found = others_of(kinds, scene)
        return replace(problem, others=found, insists=insists)

    def _rounding(self, spectra: Spectra, nodes: Mapping[str, Node]) -> RoundingPrice:
        return self.priced.setdefault(id(spectra), RoundingPrice(spectra, nodes))

    def measured_again(self, price: float | None) -> Search:
        """The search on other statistics; with a price only those groups are priced on them that
        contend near it on these."""
        if not price:
            return replace(self, problems={}, priced={})
        contend = {
            (strategy, merged, among): contenders(problem, price)
            for (_, strategy, merged, among), problem in self.problems.items()
            if problem is not None
        }
        return replace(self, problems={}, priced={}, contend=contend)

    def dense_cost(self, planned: Planned) -> int:
        """What everything dense would cost, in the options' unit."""
        assert planned.spectra is not None
        nodes = nodes_of(self.sites, planned.spectra.slices)
        return sum(dense_cost(nodes, name, self.options) for name in nodes)

    def _is_undecided(self, one: Planned) -> bool:
        """Whether measurement decides on the refit; with one input a coefficient is fitted to it
        already."""
        assert one.spectra is not None
        several = any(inputs_of(group, one.spectra) > 1 for group in one.groups)
        return self.refit is None and self.judge is not None and several

    @property
    def _dtype(self) -> torch.dtype:
        # weights multiplied out are float32 at least, which is enough to judge them by
        is_double = any(w.dtype == torch.float64 for w in self.weights.values())
        return torch.float64 if is_double else torch.float32

    def _realise(self, one: Planned, *, refit: bool) -> None:
        assert one.spectra is not None
        one.factors = Factored(one.groups, one.spectra, refit, self.bias, self._dtype)
        one.factors.share()
        one.refitted = refit

    def dense(self, one: Planned) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """See :func:`dense`."""
        return dense(self.sites, self.weights, self.biases, one.factors, one.units, one.coded)


def _losses(known: Mapping[object, Planned]) -> list[float]:
    return [one.predicted for one in known.values()]


def _shared(problem: Problem, spectra: Spectra, options: Options, strategy: str) -> Problem:
    """The problem; several processes have divided what is surely asked of its spectra."""
    if here().size > 1:
        surely = surely_priced(problem, options, strategy)
        spectra.share(part for part in surely if problem.considers(part))
    return problem


def _same_input_types(nodes: Mapping[str, Node]) -> tuple[frozenset[str], ...]:
    by_input: dict[object, set[str]] = {}
    for node in nodes.values():
        by_input.setdefault(node.input, set()).add(node.type)
    return tuple({frozenset(types) for types in by_input.values() if len(types) > 1})
