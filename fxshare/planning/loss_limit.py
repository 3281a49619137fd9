"""A limit of the loss: the budget is raised until what is measured keeps it."""

from __future__ import annotations

from dataclasses import replace

from fxshare.errors import PlanError
from fxshare.planning.planned import Planned
from fxshare.planning.search import Found, Search, SpectraByMetric
from fxshare.planning.trials import Tried


def within_loss(search: Search, best: Planned, spectra: SpectraByMetric, limit: float) -> Found:
    """Raise the budget until the measured loss keeps the limit; the prediction was a start."""
    dense = float(search.dense_cost(best))
    low, high = search.budget, dense
    if best.measured <= limit:
        low, high = 0.0, search.budget
    kept = best if best.measured <= limit else None
    tried: list[Tried] = []
    for _ in range(6):
        middle = (low + high) / 2
        try:
            found = replace(search, budget=middle).run(
                spectra, [best.trial], label=" within max_loss_increase"
            )
        except PlanError:
            low = middle
            continue
        tried += found.tried
        if found.best.measured <= limit:
            kept, high = found.best, middle
        else:
            low = middle
    if kept is None:
        raise PlanError(
            f"max_loss_increase {limit:g}: no plan of the search keeps it; the best measured "
            f"{best.measured:.3g}. Raise it, or match fewer weights"
        )
    return Found(kept, tuple(tried))


__all__ = ["within_loss"]
