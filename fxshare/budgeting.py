"""The planned mode from a configuration: statistics, search, and a plan within a budget."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fxshare.calibrate import calibrate
from fxshare.capture import Call, Captured, bind, device_of, dtype_of, to_device
from fxshare.capture.call import MASK, completed, tensors, without_labels
from fxshare.config import Budget, Planner, ShareConfig
from fxshare.cost_model import Rates
from fxshare.cost_model.device import how_to_measure_for, rates_of_model
from fxshare.errors import CalibrationError, PlanError
from fxshare.losses import Loss
from fxshare.planned import (
    GroupFactors,
    Options,
    make_problem,
    nodes_of,
    slice_statistics,
)
from fxshare.planner.cost import Storage
from fxshare.planner.solve import least_cost
from fxshare.planning import check_layers
from fxshare.plans import Outlook, Plan, Site, Skipped, TrialResult
from fxshare.search import Effort, Judge, Planned, Search, Trial, slope, substituted, trials
from fxshare.sites import site_tensors
from fxshare.spectra import SliceStatistics, Spectra
from fxshare.statistics import Statistics

_HELD_BACK = 10
_SLOPE_TOKENS = 32768


@dataclass(eq=False)
class Budgeted:
    """A plan within its budget and the factors that realise it."""

    plan: Plan
    factors: Mapping[str, GroupFactors]
    statistics: Statistics


@dataclass(frozen=True)
class _Data:
    fit: list[object]
    held_back: list[tuple[Call, object]]
    sizes: list[int]
    """Of the batches in ``fit``, see :func:`_size`."""

    def held_back_tokens(self, statistics: Statistics) -> int:
        """Tokens held back, by what a token of the statistics is: a row of the busiest linear
        (of images, say, a patch)."""
        seen = sum(self.sizes[: statistics.batches])
        held = sum(_size(call) for call, _ in self.held_back)
        return max(round(statistics.tokens * held / max(seen, 1)), 1)

    def some_to_fit(
        self, model: nn.Module, captured: Captured, statistics: Statistics
    ) -> tuple[list[tuple[Call, object]], int]:
        """Calls of at most :data:`_SLOPE_TOKENS` that the statistics have seen, and their tokens,
        counted as above."""
        seen = self.sizes[: statistics.batches]
        sums = list(itertools.accumulate(seen))
        count = max(sum(total <= _SLOPE_TOKENS for total in sums), 1)
        calls = [_judged(model, captured, batch) for batch in self.fit[:count]]
        return calls, max(round(statistics.tokens * sums[count - 1] / max(sums[-1], 1)), 1)


def plan_within_budget(
    model: nn.Module,
    captured: Captured,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    weights: Mapping[str, Tensor],
    batches: Iterable[object],
    cfg: ShareConfig,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> Budgeted:
    """Plan and factorise under the configuration's budget.

    A tenth of the calibration data is held back from the statistics; the plans of the search are
    compared on it.

    Raises :class:`PlanError` for a budget below the cheapest plan or constraints that contradict
    each other, and :class:`CalibrationError` where gradients are missing or not finite.
    """
    assert cfg.budget is not None
    start = time.perf_counter()
    planner = cfg.planner
    data = _split(model, captured, batches, planner.search)

    def gather(run: nn.Module, on: Captured) -> Statistics:
        return calibrate(
            run,
            on,
            data.fit,
            sites,
            max_tokens=cfg.calibration.max_tokens,
            total=len(data.fit),
            gradients=True,
            loss=loss,
            labels=planner.labels,
            seed=seed,
        )

    statistics = gather(model, captured)
    slices = slice_statistics(sites, weights, statistics, centred=planner.bias)
    floor = cfg.calibration.relative_floor
    options = options_of(cfg.budget, planner, model)
    check_layers(planner, sites)
    judge = None
    if planner.search != "off":
        tokens = data.held_back_tokens(statistics)
        judge = Judge(model, captured, sites, data.held_back, tokens=tokens, loss=loss)
    budget = _limit(model, cfg.budget, sites, options)
    if cfg.budget.max_loss_increase is not None:
        problem = make_problem(nodes_of(sites, slices), Spectra(slices, floor), options)
        strategy = _strategy(planner)
        budget = float(least_cost(problem, cfg.budget.max_loss_increase, strategy=strategy).cost)
    search = Search(
        sites=tuple(sites),
        weights=weights,
        biases=site_biases(model, sites),
        options=options,
        budget=budget,
        judge=judge,
        refit=planner.refit,
        bias=planner.bias,
        relative_floor=floor,
        cache=None if planner.cache is None else Path(planner.cache),
        sketch=planner.sketch,
    )
    todo = _trials(planner, options)
    best = search.run(slices, todo)
    if judge is not None:
        for number in range(planner.remeasure):
            again = _remeasured(captured, model, search, best, number, gather)
            slices_again = slice_statistics(sites, weights, again, centred=planner.bias)
            rerun = search.run(slices_again, todo, label=_label(number))
            if rerun.measured < best.measured:
                best, slices = rerun, slices_again
    limit = cfg.budget.max_loss_increase
    if limit is not None and judge is not None:
        best = _within_loss(search, best, slices, limit)
    along = 0.0
    if judge is not None and not judge.is_distance and best.factors:
        some, tokens = data.some_to_fit(model, captured, statistics)
        fit = Judge(model, captured, sites, some, tokens=tokens, loss=loss)
        along = slope(search, best, fit)
    plan = Plan(
        mode="planned",
        sites=tuple(sites),
        groups=best.groups,
        skipped=tuple(skipped),
        outlook=_outlook(
            best, search, options, statistics, judge, along, time.perf_counter() - start
        ),
    )
    return Budgeted(plan, best.factors, statistics)


def _label(number: int) -> str:
    return ", remeasured" if number == 0 else f", remeasured {number + 1} times"


def _split(
    model: nn.Module, captured: Captured, batches: Iterable[object], effort: Effort
) -> _Data:
    """Every tenth batch is held back; of few batches the last one."""
    everything = list(batches)
    if effort == "off":
        return _Data(everything, [], [])
    if len(everything) < 2:
        raise CalibrationError(
            "a search needs at least 2 calibration batches, of which one is held back to judge "
            f"plans; found {len(everything)}. Give smaller batches, or planner: {{search: off}}"
        )
    step = min(_HELD_BACK, len(everything))
    held = [_judged(model, captured, batch) for batch in everything[step - 1 :: step]]
    fit = [b for i, b in enumerate(everything) if i % step != step - 1]
    return _Data(fit, held, [_size(completed(model, bind(model, batch))) for batch in fit])


def _judged(model: nn.Module, captured: Captured, batch: object) -> tuple[Call, object]:
    """A batch as the captured graph is called with it, and as it was given."""
    keep = captured.shapes.base if captured.shapes else ()
    call = completed(model, without_labels(model, bind(model, batch), keep))
    return to_device(call, device_of(model)), batch


def _size(call: Call) -> int:
    """Numbers in a call's first tensor; masked tokens do not count."""
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    return next((t.numel() for t in tensors(call)), 1)


def options_of(budget: Budget, planner: Planner, model: nn.Module) -> Options:
    """What the configuration allows the planner, costs in the unit of its limit."""
    alone = budget.params_kept is None and budget.max_bytes is None
    alone = alone and budget.max_loss_increase is None
    storages: dict[str, tuple[Storage, ...]] = {
        "auto": ("plain", "pivoted"),
        "plain": ("plain",),
        "pivoted": ("pivoted",),
    }
    return Options(
        unit="flops" if alone else "bytes" if budget.max_bytes is not None else "numbers",
        storages=storages[planner.storage],
        element_size=dtype_of(model).itemsize,
        max_group=planner.max_group,
        rank_multiple=planner.rank_multiple,
        floor=planner.floor,
        ceiling=planner.ceiling,
        flops_kept=None if alone else budget.flops_kept,
        time_kept=budget.time_kept,
        rates=None if budget.time_kept is None else _rates(model),
        keep_dense=frozenset(planner.keep_dense),
        may_share=tuple(frozenset(types) for types in planner.may_share),
        tie=tuple(frozenset(names) for names in planner.tie),
    )


def _rates(model: nn.Module) -> Rates:
    rates = rates_of_model(model)
    if rates is None:
        raise PlanError(
            "budget.time_kept: times are predicted from constants of this device, which were not "
            f"measured for the model's dtype and this number of threads; run "
            f"{how_to_measure_for(model)}"
        )
    return rates


def _limit(model: nn.Module, budget: Budget, sites: Sequence[Site], options: Options) -> float:
    """The budget in the options' unit."""
    dense = sum(site.weights for site in sites)
    if budget.params_kept is not None:
        return float(int(budget.params_kept * dense))
    if budget.max_bytes is not None:
        whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        rest = whole - dense * options.element_size
        if budget.max_bytes <= rest:
            raise PlanError(
                f"budget.max_bytes: {budget.max_bytes:,} bytes; what is not rewritten alone takes "
                f"{rest:,}. Match more weights, or raise the budget"
            )
        return float(budget.max_bytes - rest)
    if budget.max_loss_increase is not None:
        return float(dense)
    assert budget.flops_kept is not None
    return budget.flops_kept * 2 * dense


def _strategy(planner: Planner) -> str:
    return planner.strategy


def _trials(planner: Planner, options: Options) -> list[Trial]:
    # a strategy that was asked for by name is kept to: "separate" means no sharing at all
    mergeable = not options.may_share and planner.strategy in ("auto", "same_input")
    found = trials(planner.search, mergeable=mergeable)
    return [t if t.strategy != "layers" else replace(t, strategy=_strategy(planner)) for t in found]


def site_biases(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The bias ``(out,)`` of every site that has one."""
    found = {}
    for site in sites:
        _, bias = site_tensors(model, site)
        if bias is not None:
            found[site.name] = bias.detach()
    return found


def _remeasured(
    captured: Captured,
    model: nn.Module,
    search: Search,
    best: Planned,
    number: int,
    gather: Callable[[nn.Module, Captured], Statistics],
) -> Statistics:
    """Statistics on a model compressed half as much; later rounds on the best plan so far."""
    middle = best
    if number == 0:
        dense = search.dense_cost(best)
        half = replace(search, budget=(search.budget + dense) / 2, judge=None, tried=[])
        assert best.spectra is not None
        middle = half.run(best.spectra.slices, [best.trial], label=" halfway")
    weights, biases = search.dense(middle.factors)
    if captured.front_end == "modules":
        return gather(substituted(model, search.sites, weights, biases), captured)
    graph = substituted(captured.graph, search.sites, weights, biases)
    return gather(model, replace(captured, graph=graph))


def _within_loss(
    search: Search, best: Planned, slices: Mapping[str, SliceStatistics], limit: float
) -> Planned:
    """Raise the budget until the measured loss keeps the limit; the prediction was a start."""
    dense = float(search.dense_cost(best))
    low, high = search.budget, dense
    if best.measured <= limit:
        low, high = 0.0, search.budget
    found = best if best.measured <= limit else None
    for _ in range(6):
        search.budget = (low + high) / 2
        try:
            one = search.run(slices, [best.trial], label=" within max_loss_increase")
        except PlanError:
            low = search.budget
            continue
        if one.measured <= limit:
            found, high = one, search.budget
        else:
            low = search.budget
    if found is None:
        raise PlanError(
            f"max_loss_increase {limit:g}: no plan of the search keeps it; the best measured "
            f"{best.measured:.3g}. Raise it, or match fewer weights"
        )
    return found


def _outlook(
    best: Planned,
    search: Search,
    options: Options,
    statistics: Statistics,
    judge: Judge | None,
    along: float,
    seconds: float,
) -> Outlook:
    solution = best.solution
    return Outlook(
        loss_name=statistics.loss,
        unit=options.unit,
        budget=solution.budget,
        cost=solution.cost,
        price=solution.price,
        predicted=best.predicted + along,
        slope=along,
        bound=best.bound,
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
                cost=t.cost,
                groups=t.groups,
                seconds=t.seconds,
            )
            for t in search.tried
        ),
        held_back_tokens=0 if judge is None else judge.tokens,
        seconds=seconds,
    )
