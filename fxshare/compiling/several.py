"""One model under several budgets: captured, matched and calibrated once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fxshare.base.surroundings import plain_surroundings
from fxshare.compiling.budgeted import gathered_for, within_budget
from fxshare.compiling.compile import finished
from fxshare.compiling.stages import Stages, prepare
from fxshare.config import load_config
from fxshare.factors.realise import planned_factors
from fxshare.planning.gathered import Gathered
from fxshare.result.module import Compiled
from fxshare.sites.tensors import dense_weights, site_biases


@dataclass(frozen=True, eq=False)
class Several:
    """A model and its statistics, to be compiled under budgets of several kinds and widths.

    What is computed for one plan serves the others: another budget takes seconds.
    """

    stages: Stages
    gathered: Gathered
    weights: Mapping[str, Tensor]
    base: Mapping[str, Any]
    seed: int

    @staticmethod
    @plain_surroundings()
    def of(
        model: nn.Module,
        base: Mapping[str, Any],
        batches: Sequence[object],
        *,
        search: str,
        seed: int = 0,
    ) -> Several:
        """Capture, match and calibrate under a configuration without a budget; plans are searched
        for with this effort, on the statistics of the dense model."""
        planner = {"search": search, "remeasure": 0}
        cfg = load_config([dict(base), {"budget": {"params_kept": 1.0}, "planner": planner}])
        stages = prepare(model, cfg, batches, None, None)
        weights = dense_weights(model, stages.sites)
        on = gathered_for(stages, weights, None, seed)
        return Several(stages, on, weights, base, seed)

    @plain_surroundings()
    def compiled(self, budget: Mapping[str, Any], planner: Mapping[str, Any]) -> Compiled:
        """:func:`fxshare.compile` under a budget, by a planner with these options.

        Raises :class:`PlanError` for a budget below the cheapest plan.
        """
        start = time.perf_counter()
        first = self.stages.cfg.planner
        own = {"search": first.search, "remeasure": first.remeasure, **planner}
        cfg = load_config([dict(self.base), {"budget": dict(budget), "planner": own}])
        stages = replace(self.stages, cfg=cfg)
        made = within_budget(stages, self.weights, None, self.seed, on=self.gathered)
        biases = site_biases(stages.model, made.plan.sites)
        factors = planned_factors(
            made.plan, self.weights, biases, made.factors, made.units, made.coded
        )
        return finished(stages, made.plan, factors, made.statistics, start=start)


__all__ = ["Several"]
