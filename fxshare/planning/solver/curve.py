"""Loss against cost: what the solver sees of a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fxshare.errors import PlanError

Floats = NDArray[np.float64]
DENSE = -1


@dataclass(frozen=True, eq=False)
class Curve:
    """The options of one candidate, by ascending cost; the last one is dense.

    ``cost`` is in the budget's unit, ``loss`` the predicted increase of the model's loss per token,
    ``side`` is a cost in a second unit, such as FLOPs, for a plan that is bounded in that as well.
    ``label`` is what whoever made the curve calls each option (:data:`DENSE` for dense), and
    ``meanings`` what labels stand for; the solver hands both back and reads neither.
    """

    cost: NDArray[np.int64]
    loss: Floats
    label: NDArray[np.int64]
    side: NDArray[np.int64] | None = None
    meanings: Sequence[object] = ()

    def meaning(self, option: int) -> object:
        """What an option stands for to whoever made the curve; None for dense."""
        label = int(self.label[option])
        return None if label == DENSE else self.meanings[label]

    def __post_init__(self) -> None:
        if not np.isfinite(self.loss).all() or (self.loss < 0).any():
            raise PlanError(
                "a candidate's loss curve is not finite or below zero; look for NaN in the "
                "gradients or inputs of its sites"
            )

    @cached_property
    def hull(self) -> NDArray[np.int32]:
        """Options on the lower convex hull, by ascending cost: all that any price can choose."""
        order = np.lexsort((self.loss, self.cost))
        # cheaper and no worse: what remains falls strictly in loss and rises strictly in cost
        best_before = np.minimum.accumulate(self.loss[order])
        useful = np.concatenate([[True], self.loss[order][1:] < best_before[:-1]])
        chosen = order[useful]
        while len(chosen) > 2:
            run = np.diff(self.cost[chosen]).astype(np.float64)
            slope = -np.diff(self.loss[chosen]) / run
            # a point above the segment between any two others is not on the hull, so all such
            # points can go at once
            above = np.concatenate([[False], slope[1:] >= slope[:-1], [False]])
            if not above.any():
                break
            chosen = chosen[~above]
        hull: NDArray[np.int32] = chosen.astype(np.int32)  # of thousands of candidates
        return hull

    @cached_property
    def slopes(self) -> Floats:
        """Loss saved per unit of cost between consecutive hull options; descending."""
        cost, loss = self.cost[self.hull], self.loss[self.hull]
        saved: Floats = (loss[:-1] - loss[1:]) / np.maximum(cost[1:] - cost[:-1], 1)
        return np.minimum.accumulate(saved) if len(saved) else saved

    def at_price(self, price: float) -> int:
        """The option that minimises ``loss + price · cost``."""
        steps = int(np.searchsorted(-self.slopes, -price, side="left"))
        return int(self.hull[steps])

    def values(self, prices: Floats) -> Floats:
        """``min (loss + price · cost)`` at each of several prices."""
        options = self.hull[np.searchsorted(-self.slopes, -prices, side="left")]
        found: Floats = self.loss[options] + prices * self.cost[options]
        return found

    def value(self, price: float) -> float:
        """``min (loss + price · cost)``."""
        option = self.at_price(price)
        return float(self.loss[option] + price * self.cost[option])


def allowed(
    cost: NDArray[np.int64],
    label: NDArray[np.int64],
    *,
    least: float = 0.0,
    most: float | None = None,
) -> NDArray[np.int64]:
    """Which options cost at least ``least`` and, dense apart, at most ``most``; the dearest where
    none does."""
    keep = cost >= least
    if most is not None:
        keep &= cost <= most
    # dense always remains: nothing else can be done where the floor is above every rank
    if most is None or not keep.any():
        keep |= label == DENSE
    if not keep.any() and len(cost):  # the dense option is one in few bits
        keep |= cost == cost.max()
    return np.flatnonzero(keep)
