"""The planned mode from a configuration: statistics, search, and a plan within a budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fxshare.base.memory import give_back
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Captured
from fxshare.config import Planner, ShareConfig
from fxshare.factors.codes import CodedSlices
from fxshare.factors.group import GroupFactors
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.planning.finalists import Calls
from fxshare.planning.gathered import Gather, Gathered
from fxshare.planning.kinds.apart import by_kind
from fxshare.planning.kinds.kind import FoundPart, Kind
from fxshare.planning.kinds.named import all_parts
from fxshare.planning.loss_limit import within_loss
from fxshare.planning.offered import Choose, choice, plan_of
from fxshare.planning.options import Options, options_of
from fxshare.planning.planned import Planned
from fxshare.planning.priced import priced
from fxshare.planning.search import Found, Search, SpectraByMetric
from fxshare.planning.slope import Slope, slope
from fxshare.planning.stored_problem import Stored, write_problem
from fxshare.planning.trials import Trial, again, trials
from fxshare.plans.outlook import KindOutlook, Outlook, TrialResult
from fxshare.plans.plan import Plan
from fxshare.sites.tensors import site_biases, substituted

_LOG = logging.getLogger(__name__)
_LAST = 0.1
"""Of the room for what may be asked for again, once there is a plan."""


@dataclass(eq=False)
class Budgeted:
    """A plan within its budget and the factors that realise it."""

    plan: Plan
    factors: Mapping[str, GroupFactors]
    statistics: Statistics
    spectra: Spectra
    """What was priced on the statistics."""
    units: Mapping[str, UnitFactors] = field(default_factory=dict)
    """What carries out the plan's entries of other kinds."""
    kinds: tuple[Kind, ...] = ()
    parts: tuple[FoundPart, ...] = ()
    coded: CodedSlices | None = None
    """The codes of dense slices, where the plan has some in few bits."""
    search: Search | None = None  # for plans under other budgets on the same spectra


def plan_on(
    on: Gathered,
    cfg: ShareConfig,
    *,
    choose: Choose | None = None,
    since: float | None = None,
    only: bool = False,
) -> Budgeted:
    """Plan and factorise under the configuration's budget, on statistics that were gathered;
    ``since`` is when that began. The plans of the search are compared on the data held back, and
    the best of them by ``choose`` where it is given. Unless it is the ``only`` plan on these
    statistics, the slope, and what each kind loses by itself, are not measured, and what was
    computed is kept for the others.

    Raises :class:`PlanError` for a budget below the cheapest plan or constraints that contradict
    each other, and :class:`CalibrationError` where gradients are missing or not finite.
    """
    assert cfg.budget is not None
    start = time.perf_counter() if since is None else since
    planner, model = cfg.planner, on.captured.model
    kinds, parts = on.kinds(planner)
    options = options_of(cfg.budget, planner, model)
    statistics = on.statistics
    whole = (model, on.sites, on.skipped, on.slices, statistics, cfg)
    # the parts of all kinds: a later budget may name others
    write_problem(on.work, lambda: Stored.of(*whole, all_parts(on.captured, on.sites)))
    search = _search(on, options, cfg)
    search = replace(search, kinds=kinds, parts=parts)
    first = _trials(planner, options, kinds if parts else ())[0]
    search, spectra = priced(search, on.slices, model, cfg, first, on.known)

    def remeasured(best: Planned, spectra: SpectraByMetric, number: int) -> SpectraByMetric:
        again = _remeasured(on.captured, search, best, spectra, number, on.gather)
        return search.spectra(on.in_metric(again, planner), number + 1)

    found = _searched(search, spectra, cfg, remeasured, on.fit)
    if choose is not None:
        found = choice(found, search, on.skipped, lambda plans: choose(plans, on.data))
    best, judge = found.best, search.judge
    along = Slope(0.0, 0.0, 0)
    changed = best.factors or best.units or best.rounded
    if only and judge is not None and not judge.is_distance and changed:
        along = _along(search, best, on.fit)
    kinds_apart = by_kind(search, best) if only else ()
    outlook = _outlook(found, search, statistics, (along, kinds_apart), time.perf_counter() - start)
    plan = plan_of(best, search, on.skipped, outlook)
    if only:
        best.factors.spectra.release(_LAST)  # factors that are kept are made one after the other
    factors = replace(best.factors, dtype=torch.float64)
    coded = None if best.coded is None else replace(best.coded, dtype=torch.float64)
    units: Mapping[str, UnitFactors] = best.units or {}
    return Budgeted(plan, factors, statistics, spectra[True], units, kinds, parts, coded, search)


def _search(on: Gathered, options: Options, cfg: ShareConfig) -> Search:
    planner = cfg.planner
    return Search(
        sites=tuple(on.sites),
        weights=on.weights,
        biases=site_biases(on.captured.model, on.sites),
        options=options,
        budget=math.inf,
        judge=None if planner.search == "off" else on.judge,
        refit=planner.refit,
        bias=planner.bias,
        relative_floor=cfg.calibration.relative_floor,
        cache=None if planner.cache is None else Path(planner.cache),
        work=on.work,
        sketch=planner.sketch,
        room=on.room.kept - on.kept_of_slices,
    )


def _along(search: Search, best: Planned, fit: Calls | None) -> Slope:
    assert fit is not None
    assert search.judge is not None
    search.judge.forget()
    new, old = search.dense(best), (search.weights, search.biases)
    what = None if best.what is None else ("slope", best.what)
    found = slope(fit.judge, fit.tokens, old, new, predicted=best.predicted, what=what)
    fit.judge.forget()
    return found


def _searched(
    search: Search,
    spectra: SpectraByMetric,
    cfg: ShareConfig,
    remeasured: Callable[[Planned, SpectraByMetric, int], SpectraByMetric],
    fit: Calls | None,
) -> Found:
    """The best plan of the search. With a judge also on statistics that are measured again on what
    was found so far, and within the limit of the loss."""
    todo = _trials(cfg.planner, search.options, search.kinds if search.parts else ())
    found = search.run(spectra, todo)
    if search.judge is None:
        return found
    best, tried, plans = found.best, found.tried, found.plans
    assert cfg.budget is not None
    limit = cfg.budget.max_loss_increase
    for number in range(cfg.planner.remeasure):
        spectra_again = remeasured(best, spectra, number)
        # a limit of the loss is looked for at other prices too
        anew = search.measured_again(best.solution.price if limit is None else None)
        search.problems.clear()
        search.priced.clear()
        rerun = anew.run(spectra_again, again(todo, found.tried), label=_label(number))
        tried += rerun.tried
        plans += rerun.plans
        if rerun.best.measured < best.measured:
            best, spectra = rerun.best, spectra_again
    if fit is not None:
        best = search.decided(best, [one for _, one in plans], fit)
    if limit is not None:
        within = within_loss(search, best, spectra, limit)
        best, tried = within.best, tried + within.tried
    return Found(best, tried, plans)


def _label(number: int) -> str:
    return ", remeasured" if number == 0 else f", remeasured {number + 1} times"


def _trials(planner: Planner, options: Options, kinds: Sequence[Kind]) -> list[Trial]:
    # a strategy that was asked for by name is kept to: "separate" means no sharing at all
    mergeable = not options.may_share and planner.strategy in ("auto", "same_input")
    found = trials(
        planner.search,
        mergeable=mergeable,
        kinds=[kind.name for kind in kinds],
        bits=planner.bits,
        based=options.shares_bases,
    )
    return [t if t.strategy != "layers" else replace(t, strategy=planner.strategy) for t in found]


def _remeasured(
    captured: Captured,
    search: Search,
    best: Planned,
    spectra: SpectraByMetric,
    number: int,
    gather: Gather,
) -> Statistics:
    """Statistics on a model compressed half as much; later rounds on the best plan so far."""
    middle = best
    if number == 0:
        dense = search.dense_cost(best)
        half = replace(search, budget=(search.budget + dense) / 2, judge=None)
        middle = half.run(spectra, [best.trial], label=" halfway").best
    if search.judge is not None:
        search.judge.forget()  # its weights are as many as those that are made now
    on = substituted(captured, search.sites, *search.dense(middle))
    for one in spectra.values():
        one.release()
    give_back(sum(weight.nbytes for weight in search.weights.values()))
    return gather(on, number + 1)


def _outlook(
    found: Found,
    search: Search,
    statistics: Statistics,
    also: tuple[Slope, tuple[KindOutlook, ...]],
    seconds: float,
) -> Outlook:
    along, kinds = also
    best, solution = found.best, found.best.solution
    return Outlook(
        loss_name=statistics.loss,
        unit=search.options.unit,
        budget=solution.budget,
        cost=solution.cost,
        price=solution.price,
        predicted=best.predicted + along.value,
        slope=along.value,
        slope_tokens=along.tokens,
        bound=best.bound,
        priced_bound=best.priced_bound,
        priced=solution.priced,
        unpriced=solution.unpriced,
        gap=max(best.predicted - best.bound, 0.0),
        measured=best.measured if math.isfinite(best.measured) else None,
        strategy=solution.strategy,
        trial=best.trial.name,
        refit=best.refitted,
        trials=tuple(
            TrialResult(
                name=t.trial,
                predicted=t.predicted,
                measured=t.measured if math.isfinite(t.measured) else None,
                tokens=t.tokens,
                cost=t.cost,
                groups=t.groups,
                seconds=t.seconds,
                refined=t.after.loss if t.after and math.isfinite(t.after.loss) else None,
                refined_steps=0 if t.after is None else t.after.steps,
            )
            for t in found.tried
        ),
        kinds=kinds,
        held_back_tokens=0 if search.judge is None else search.judge.tokens,
        seconds=seconds,
    )
