"""A plan within the configuration's budget, with its factors."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxshare.base.memory import give_back
from fxshare.base.progress import stage
from fxshare.calibration.losses import Loss
from fxshare.compiling.given import check_values
from fxshare.compiling.refined import after_refining
from fxshare.compiling.stages import Stages
from fxshare.compiling.together import one_plan
from fxshare.errors import CalibrationError, PlanError
from fxshare.planning.budget import Budgeted, plan_on
from fxshare.planning.gathered import Gathered, gathered
from fxshare.planning.held_back import Parts
from fxshare.planning.offered import Offered
from fxshare.planning.rules import check_layers
from fxshare.planning.trials import AfterRefining
from fxshare.planning.work import Work

_LOG = logging.getLogger(__name__)


def within_budget(
    stages: Stages,
    weights: Mapping[str, Tensor],
    loss: Loss | None,
    seed: int,
    work: Work | None = None,
    on: Gathered | None = None,
) -> Budgeted:
    """The plan under the configuration's budget, with its factors; ``on`` statistics that were
    gathered before, or on those that it gathers.

    Raises :class:`CalibrationError` without calibration data, and what
    :func:`fxshare.planning.budget.plan_on` raises.
    """
    if stages.batches is None:
        raise CalibrationError(
            "a budget needs calibration data to predict losses with: give calibration=..., or use "
            "group_size and compression_rate, which do without"
        )
    assert stages.cfg.budget is not None
    by_refining = stages.cfg.planner.search == "refined"
    if by_refining and stages.cfg.budget.max_loss_increase is not None:
        raise PlanError(
            "planner: {search: refined} compares plans of one size, and budget: {max_loss_increase}"
            " looks for the size; give params_kept, or search: quick"
        )

    def choose(plans: Sequence[Offered], data: Parts) -> Sequence[AfterRefining]:
        return after_refining(stages, weights, plans, data, loss=loss, seed=seed)

    with stage("plan", _LOG) as running:
        start = time.perf_counter()
        only = on is None
        check_layers(stages.cfg.planner, stages.sites)
        if on is None:
            on = gathered_for(stages, weights, loss, seed, work)
        chosen_by = choose if by_refining else None
        made = plan_on(on, stages.cfg, choose=chosen_by, since=start, only=only)
        made.plan = one_plan(made.plan)
        give_back(made.plan.dense_numbers)  # other plans, and the candidates that were judged
        running.found(f"planned mode, {len(made.plan.groups)} groups")
    return made


def gathered_for(
    stages: Stages,
    weights: Mapping[str, Tensor],
    loss: Loss | None,
    seed: int,
    work: Work | None = None,
) -> Gathered:
    """The statistics of a model that plans are made on."""
    assert stages.batches is not None
    check_values(weights)
    return gathered(
        stages.measuring,
        stages.sites,
        stages.skipped,
        weights,
        stages.batches,
        stages.cfg,
        loss=loss,
        seed=seed,
        work=work,
    )


__all__ = ["gathered_for", "within_budget"]
