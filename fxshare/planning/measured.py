"""Plans of a sweep carried out and measured on what is held back, as many as time allows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fxshare.base.processes import here
from fxshare.base.progress import stage
from fxshare.errors import FactoriseError, PlanError
from fxshare.factors.spectra import Spectra
from fxshare.planning.search import Search
from fxshare.planning.sweep import Sweep
from fxshare.planning.trials import Trial

_LOG = logging.getLogger(__name__)


def measured_at(search: Search, spectra: Spectra, strategy: str) -> Callable[[float], float]:
    """What the plan under a budget, in the options' unit, loses per token of what is held back:
    the optimum of the quadratic model, that a sweep predicts, with its factors refitted where the
    search refits. NaN where it cannot be carried out."""
    trial = Trial("planned", strategy=strategy)

    def measure(budget: float) -> float:
        try:
            found = replace(search, budget=budget).run(
                {True: spectra}, [trial], label=f" at {budget:,.0f}"
            )
        except (PlanError, FactoriseError):
            return math.nan
        return found.best.measured

    return measure


def measure_sweep(sweep: Sweep, measure: Callable[[float], float], seconds: float) -> Sweep:
    """The sweep with losses that were measured, of one budget after the other, those first that are
    furthest from what was measured already, until the next one would end after ``seconds``.

    ``measure`` gives the loss at a budget in the sweep's unit, see :func:`measured_at`. A plan that
    loses nothing is dense, and is not run. Which budgets are measured depends on the machine, what
    is measured does not.
    """
    todo = [at for at, point in enumerate(sweep.planned) if point.loss > 0]
    points, longest, begun = list(sweep.planned), 0.0, time.perf_counter()
    with stage("plan: measuring the sweep", _LOG) as running:
        for at in _spread(todo):
            start = time.perf_counter()
            fits = start - begun + longest <= seconds and seconds > 0
            if not here().gather(fits, "the time for a sweep")[0]:
                break
            found = measure(points[at].budget * sweep.dense)
            points[at] = replace(points[at], measured=found if math.isfinite(found) else None)
            longest = max(longest, time.perf_counter() - start)
        done = sum(point.measured is not None for point in points)
        running.found(f"{done} of {len(todo)} budgets")
    return replace(sweep, planned=tuple(points))


def _spread(numbers: Sequence[int]) -> list[int]:
    """The numbers, each the furthest from those before it; first the one in the middle."""
    left = list(numbers)
    found = [left.pop(len(left) // 2)] if left else []
    while left:
        furthest = max(left, key=lambda one: min(abs(one - other) for other in found))
        left.remove(furthest)
        found.append(furthest)
    return found


__all__ = ["measure_sweep", "measured_at"]
