"""The planned mode from a configuration: statistics, search, and a plan within a budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fxshare.base.memory import give_back
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.keeping import Keeping
from fxshare.calibration.losses import Loss
from fxshare.calibration.room import Room, make_room
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Captured
from fxshare.config import Planner, ShareConfig
from fxshare.factors.codes import CodedSlices
from fxshare.factors.group import GroupFactors
from fxshare.factors.metric import SliceStatistics, slice_statistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.planning.finalists import Calls
from fxshare.planning.held_back import Judged, Parts, hold_back
from fxshare.planning.judge import Judge, Remembered
from fxshare.planning.kinds.apart import by_kind
from fxshare.planning.kinds.kind import FoundPart, Kind
from fxshare.planning.kinds.named import kinds_and_parts
from fxshare.planning.loss_limit import within_loss
from fxshare.planning.offered import Choose, choice, plan_of
from fxshare.planning.options import Options, options_of
from fxshare.planning.planned import Planned
from fxshare.planning.priced import priced
from fxshare.planning.rules import check_layers
from fxshare.planning.search import Found, Search, SpectraByMetric
from fxshare.planning.slope import Slope, slope
from fxshare.planning.stored_problem import Stored, write_problem
from fxshare.planning.trials import Trial, again, trials
from fxshare.planning.work import Work
from fxshare.plans.outlook import KindOutlook, Outlook, TrialResult
from fxshare.plans.plan import Plan
from fxshare.sites.site import Site, Skipped
from fxshare.sites.tensors import site_biases, substituted

_LOG = logging.getLogger(__name__)
_LAST = 0.1
"""Of the room for what may be asked for again, once there is a plan."""
Gather = Callable[[Captured, int], Statistics]  # on what was captured, of a round


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


def plan_within_budget(
    captured: Captured,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    weights: Mapping[str, Tensor],
    batches: Iterable[object],
    cfg: ShareConfig,
    *,
    loss: Loss | None = None,
    seed: int = 0,
    work: Work | None = None,
    choose: Choose | None = None,
) -> Budgeted:
    """Plan and factorise under the configuration's budget.

    A tenth of the calibration data is held back from the statistics; the plans of the search are
    compared on it, and the best of them by ``choose`` where it is given.

    Raises :class:`PlanError` for a budget below the cheapest plan or constraints that contradict
    each other, and :class:`CalibrationError` where gradients are missing or not finite.
    """
    assert cfg.budget is not None
    start = time.perf_counter()
    planner, model = cfg.planner, captured.model
    kinds, parts = kinds_and_parts(planner, captured, sites)
    data = hold_back(captured, batches, planner.search)
    give_back(sum(weight.nbytes for weight in weights.values()))  # what capturing left behind
    room = _room(captured, sites, weights, data.fit[0], cfg, work)
    gather = _gathering(data.fit, sites, weights, cfg, loss, seed, (room.keeping, work))
    statistics = gather(captured, 0)
    most_bytes, biases = room.kept // 4, site_biases(model, sites)

    def in_metric(statistics: Statistics) -> Mapping[str, SliceStatistics]:
        return slice_statistics(
            sites,
            weights,
            statistics,
            biases=biases,
            centred=planner.bias,
            most_bytes=most_bytes,
        )

    slices = in_metric(statistics)
    options = options_of(cfg.budget, planner, model)
    write_problem(work, lambda: Stored.of(model, sites, skipped, slices, statistics, cfg, parts))
    check_layers(planner, sites)
    judge = None
    if planner.search != "off":
        judged = data.judged(captured, statistics, loss)
        judge = Judge(captured, sites, judged, loss=loss, remembered=_memory_of(work))
    search = _search(model, sites, weights, options, cfg, judge, work)
    search = replace(search, room=room.kept - most_bytes, kinds=kinds, parts=parts)
    first = _trials(planner, options, kinds if parts else ())[0]
    search, spectra = priced(search, slices, model, cfg, first)
    fit = _fit(captured, search, data, statistics, loss, work)

    def remeasured(best: Planned, spectra: SpectraByMetric, number: int) -> SpectraByMetric:
        again = _remeasured(captured, search, best, spectra, number, gather)
        return search.spectra(in_metric(again), number + 1)

    found = _searched(search, spectra, cfg, remeasured, fit)
    if choose is not None:
        found = choice(found, search, skipped, lambda plans: choose(plans, data))
    best = found.best
    along = Slope(0.0, 0.0, 0)
    if judge is not None and not judge.is_distance and (best.factors or best.units or best.rounded):
        along = _along(search, best, fit)
    kinds_apart = by_kind(search, best)
    outlook = _outlook(found, search, statistics, (along, kinds_apart), time.perf_counter() - start)
    plan = plan_of(best, search, skipped, outlook)
    best.factors.spectra.release(_LAST)  # factors that are kept are made one after the other
    factors = replace(best.factors, dtype=torch.float64)
    coded = None if best.coded is None else replace(best.coded, dtype=torch.float64)
    units: Mapping[str, UnitFactors] = best.units or {}
    return Budgeted(plan, factors, statistics, spectra[True], units, kinds, parts, coded, search)


def _search(
    model: nn.Module,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    options: Options,
    cfg: ShareConfig,
    judge: Judge | None,
    work: Work | None,
) -> Search:
    planner = cfg.planner
    return Search(
        sites=tuple(sites),
        weights=weights,
        biases=site_biases(model, sites),
        options=options,
        budget=math.inf,
        judge=judge,
        refit=planner.refit,
        bias=planner.bias,
        relative_floor=cfg.calibration.relative_floor,
        cache=None if planner.cache is None else Path(planner.cache),
        work=work,
        sketch=planner.sketch,
    )


def _fit(
    captured: Captured,
    search: Search,
    data: Parts,
    statistics: Statistics,
    loss: Loss | None,
    work: Work | None,
) -> Calls | None:
    """Some of the calls that the statistics were taken of, for what a search asks of them."""
    if search.judge is None:
        return None
    some, tokens = data.some_to_fit(captured, statistics)
    every = Judged(some, 0, len(some), 0)
    judge = Judge(captured, search.sites, every, loss=loss, remembered=_memory_of(work))
    return Calls(judge, tokens)


def _along(search: Search, best: Planned, fit: Calls | None) -> Slope:
    assert fit is not None
    assert search.judge is not None
    search.judge.forget()
    new, old = search.dense(best), (search.weights, search.biases)
    what = None if best.what is None else ("slope", best.what)
    found = slope(fit.judge, fit.tokens, old, new, predicted=best.predicted, what=what)
    fit.judge.forget()
    return found


def _memory_of(work: Work | None) -> Remembered | None:
    return None if work is None else work.remembered


def _room(
    captured: Captured,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    batch: object,
    cfg: ShareConfig,
    work: Work | None,
) -> Room:
    """How memory is divided, said before anything is measured."""
    again = cfg.planner.search != "off" and cfg.planner.remeasure > 0
    room = make_room(
        captured,
        sites,
        weights,
        captured.caller(batch),
        limit=cfg.calibration.max_memory,
        gradients=True,
        rounds=2 if again else 1,
        folder=None if work is None else work.path,
    )
    room.say(_LOG, asked=cfg.calibration.max_memory is not None)
    return room


def _gathering(
    batches: Sequence[object],
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    cfg: ShareConfig,
    loss: Loss | None,
    seed: int,
    where: tuple[Keeping, Work | None],
) -> Gather:
    keeping, work = where

    def gather(on: Captured, number: int) -> Statistics:
        folder = keeping.folder and keeping.folder / f"round-{number}"
        if work is not None:
            folder = work.statistics(number)
        return calibrate(
            on,
            batches,
            sites,
            max_tokens=cfg.calibration.max_tokens,
            gradients=True,
            loss=loss,
            labels=cfg.planner.labels,
            seed=seed,
            weights=weights,
            keeping=replace(keeping, folder=folder),
        )

    return gather


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
    names = [kind.name for kind in kinds] if options.shares_bases else []
    found = trials(planner.search, mergeable=mergeable, kinds=names)
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
    on = substituted(captured, search.sites, *search.dense(middle))
    for one in spectra.values():
        one.release()
    if search.judge is not None:
        search.judge.forget()
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
