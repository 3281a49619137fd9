"""Another budget for a model that a work folder knows: no model, no data, seconds."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fxshare.compiling.survey import Survey
from fxshare.config import ConfigSource, ShareConfig, load_config
from fxshare.errors import ConfigError, FxShareWarning, PlanError
from fxshare.planning.kinds.basis import groups_of, make_problem, rounded_of
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.named import entries_of, kinds_named, others_of
from fxshare.planning.nodes import nodes_for
from fxshare.planning.options import Unit, limit_of, options_for
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.rules import check_layers
from fxshare.planning.solver.solve import Solution, least_cost, solve
from fxshare.planning.stored_problem import Stored, StoredSpectra, parts_in, read_problem
from fxshare.planning.sweep import alternatives, sweep_budgets
from fxshare.planning.work import check_versions, deciding
from fxshare.plans.outlook import Outlook
from fxshare.plans.plan import Plan

_CALLED = {"max_tokens": "calibration.max_tokens", "labels": "planner.labels"}
"""The sections that are not called as they are in a file."""


def replan(
    work: str | os.PathLike[str],
    cfg: Sequence[ConfigSource] = (),
    *,
    overrides: Sequence[str] = (),
    shares: Sequence[float] = (),
) -> Survey:
    """A plan under another budget from what a work folder has, predicted and not measured.

    ``cfg`` and ``overrides`` (``key.sub=value``) are composed over the configuration of the run
    that wrote the folder; a budget in them takes the place of that one's. ``shares`` are further
    budgets, as in :func:`survey`.

    Raises :class:`StoreError` for a folder without a problem, or of other versions,
    :class:`PlanError` for groups that it has not priced, a budget in time, or none at all, and
    :class:`ConfigError` for weight types or data that are not those of the folder.
    """
    start = time.perf_counter()
    folder = Path(work)
    stored = read_problem(folder)
    check_versions(folder)
    config = _config(stored, cfg, overrides)
    if config.budget is None:
        raise PlanError(f"{folder}: expected a budget to plan for; give one, such as --keep 0.6")
    if config.budget.time_kept is not None:
        raise PlanError("budget.time_kept: times are predicted for a model; give MODEL as well")
    if config.planner.never_slower:
        raise PlanError("planner.never_slower: times are predicted for a model; give MODEL as well")
    _check_as_measured(folder, stored, config)
    check_layers(config.planner, stored.sites)
    options = options_for(config.budget, config.planner, stored.element_size)
    nodes = nodes_for(stored.sites, stored.inputs)
    kinds, priced = kinds_named(config.planner.kinds), StoredSpectra.of(folder, config)
    parts = parts_in(stored)
    if kinds and not parts:
        warnings.warn(
            f"planner.kinds {list(config.planner.kinds)}: {folder} knows no MLP and no attention "
            "that these may take, so that nothing but bases competes",
            FxShareWarning,
            stacklevel=2,
        )
    rounding = RoundingPrice(priced, nodes)
    problem = make_problem(nodes, priced, options, rounding=rounding)
    scene = Scene(parts, nodes, priced, options, rounding)
    problem = replace(problem, others=others_of(kinds, scene))
    budget = limit_of(stored.whole_bytes, config.budget, stored.sites, options)
    strategy = config.planner.strategy
    if config.budget.max_loss_increase is not None:
        solution = least_cost(problem, config.budget.max_loss_increase, strategy=strategy)
    else:
        solution = solve(problem, budget, strategy=strategy)
    plan = Plan(
        mode="planned",
        sites=stored.sites,
        groups=groups_of(solution, nodes),
        units=entries_of(kinds, solution),
        rounded=rounded_of(solution),
        skipped=stored.skipped,
        outlook=_outlook(solution, stored, options.unit, time.perf_counter() - start),
    )
    swept = None
    if shares:
        swept = sweep_budgets(
            problem, shares, options, strategy=strategy, loss_name=stored.loss_name
        )
    dense = [s.name for x in plan.sites for s in x.slices if s.name not in plan.rewritten]
    return Survey(plan, alternatives(problem, dense, solution.price), swept)


def _config(stored: Stored, cfg: Sequence[ConfigSource], overrides: Sequence[str]) -> ShareConfig:
    """The folder's configuration with what is given over it."""
    named = stored.config.model_dump(mode="json", exclude_none=True)
    known = {"budget": named.pop("budget", None)}
    try:
        found = load_config([named, *cfg], overrides=overrides)
    except ConfigError as alone:  # a planner's options without a budget among them
        try:
            return load_config([named, known, *cfg], overrides=overrides)
        except ConfigError as with_known:
            raise with_known if "found without budget" in str(alone) else alone from None
    return found if found.budget is not None else load_config([found, known])


def _check_as_measured(folder: Path, stored: Stored, config: ShareConfig) -> None:
    """A ``ConfigError`` for what would have to be matched or measured anew."""
    before, now = deciding(stored.config), deciding(config)
    other = [name for name in before if before[name] != now[name]]
    if other:
        raise ConfigError(
            f"{', '.join(_CALLED.get(name, name) for name in other)}: {folder} was made under "
            "another one, which decided what was matched and measured, and neither happens again "
            "here; leave it out, or give MODEL, --calibration and another folder"
        )


def _outlook(solution: Solution, stored: Stored, unit: Unit, seconds: float) -> Outlook:
    return Outlook(
        loss_name=stored.loss_name,
        unit=unit,
        budget=solution.budget if math.isfinite(solution.budget) else solution.cost,
        cost=solution.cost,
        price=solution.price,
        predicted=solution.loss,
        bound=solution.bound,
        priced_bound=solution.priced_bound,
        priced=solution.priced,
        unpriced=solution.unpriced,
        gap=solution.gap,
        strategy=solution.strategy,
        trial="planned",
        refit=stored.config.planner.refit is not False,
        seconds=seconds,
    )


__all__ = ["replan"]
