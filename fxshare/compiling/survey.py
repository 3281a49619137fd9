"""``fxshare.plan``, and what the command line shows beside a plan."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fxshare.base.processes import here, in_step
from fxshare.base.surroundings import outside_inference, plain_surroundings
from fxshare.calibration.losses import Loss
from fxshare.compiling.budgeted import within_budget
from fxshare.compiling.stages import (
    Stages,
    check_module,
    configuration,
    prepare,
    working,
)
from fxshare.config import ConfigSource, load_config
from fxshare.errors import PlanError
from fxshare.models.wrapped import unwrapped
from fxshare.planning.budget import Budgeted
from fxshare.planning.kinds.basis import make_problem
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.named import others_of
from fxshare.planning.measured import measure_sweep, measured_at
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import options_of
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.rules import make_plan, uniform_plan
from fxshare.planning.sweep import Alternative, Sweep, alternatives, sweep_budgets
from fxshare.plans.plan import Plan
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights


@plain_surroundings()
@in_step()
def make_plan_for(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    loss: Loss | None = None,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
) -> Plan:
    """The plan of a compilation without carrying it out (``fxshare.plan``).

    ``cfg`` as in :func:`compile`. In exact and sharing mode nothing of the model is run, so a model
    on the meta device will do, and names alone tell what matches; give an ``example`` to leave out
    what no call shows. A budget needs ``calibration`` to be spent well; without it the plan
    has uniform ranks, each slice for itself, and says sizes and FLOPs only. ``work`` as in
    :func:`compile`.
    """
    model = outside_inference(unwrapped(model))
    config = configuration(model, cfg)
    check_module(model)
    if calibration is not None or example is not None:
        # captured, so that the plan leaves out what the graph never calls
        stages = prepare(model, config, calibration, example, None)
        if config.mode != "planned":
            return make_plan(config, stages.sites, stages.skipped)
        if calibration is None:
            return uniform_plan(config, stages.sites, stages.skipped)
        here().agree({"call": "plan"})
        with working(stages, work, loss, seed) as (held, folder):
            weights = dense_weights(model, held.sites)
            return within_budget(held, weights, loss, seed, folder).plan
    matching = match(model, config)
    if config.mode == "planned":
        return uniform_plan(config, matching.sites, matching.skipped)
    return make_plan(config, matching.sites, matching.skipped)


@dataclass(frozen=True)
class Survey:
    """A plan, and what else there was to be had: what each dense slice could be instead (nothing
    without data), and the losses of other budgets where they were asked for."""

    plan: Plan
    alternatives: Mapping[str, Alternative | None]
    sweep: Sweep | None = None


@plain_surroundings()
@in_step()
def survey(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource],
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    loss: Loss | None = None,
    seed: int = 0,
    shares: Sequence[float] = (),
    sweep_seconds: float | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Survey:
    """:func:`make_plan_for`, and what the plan can be compared with.

    ``shares`` are further budgets to plan for, as shares of the dense cost, on the statistics of
    the first calibration and without a search; :class:`PlanError` unless the configuration has a
    budget and there is data. As many of them as ``sweep_seconds`` allow are carried out and
    measured on held-back data, unless the search is off; None for as long as the plan took.
    """
    model = outside_inference(unwrapped(model))
    config = load_config(cfg)
    if config.budget is None or calibration is None:
        if shares:
            what = "a budget" if config.budget is None else "calibration data"
            raise PlanError(
                f"a sweep predicts losses under budgets and needs {what}: give "
                f"{'budget: {params_kept: 0.8}' if config.budget is None else 'calibration=...'}"
            )
        made = make_plan_for(
            model, config, calibration=calibration, example=example, loss=loss, seed=seed
        )
        return Survey(made, {})
    stages = prepare(model, config, calibration, example, None)
    with working(stages, work, loss, seed) as (held, folder):
        weights = dense_weights(model, held.sites)
        budgeted = within_budget(held, weights, loss, seed, folder)
        return _surveyed(held, budgeted, shares, sweep_seconds)


def _surveyed(
    stages: Stages, budgeted: Budgeted, shares: Sequence[float], seconds: float | None
) -> Survey:
    """What the plan can be compared with."""
    config, model = stages.cfg, stages.model
    assert config.budget is not None
    plan, statistics = budgeted.plan, budgeted.statistics
    planner = config.planner
    options = options_of(config.budget, planner, model)
    spectra = budgeted.spectra
    nodes = nodes_of(stages.sites, spectra.slices)
    rounding = RoundingPrice(spectra, nodes)
    problem = make_problem(nodes, spectra, options, rounding=rounding)
    scene = Scene(budgeted.parts, problem.nodes, spectra, options, rounding)
    problem = replace(problem, others=others_of(budgeted.kinds, scene))
    swept = None
    if shares:
        swept = sweep_budgets(
            problem, shares, options, strategy=planner.strategy, loss_name=statistics.loss
        )
        search = budgeted.search
        if search is not None and search.judge is not None:
            if seconds is None:
                seconds = 0.0 if plan.outlook is None else plan.outlook.seconds
            measure = measured_at(search, spectra, planner.strategy)
            swept = measure_sweep(swept, measure, seconds)
    dense = [s.name for x in plan.sites for s in x.slices if s.name not in plan.rewritten]
    price = 0.0 if plan.outlook is None else plan.outlook.price
    return Survey(plan, alternatives(problem, dense, price), swept)
