"""A kind of candidate of one's own: hidden units by how large they are on the data."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, metric_of
from fxshare.planning.kinds.units import HiddenUnits


class Loudest(HiddenUnits):
    """Keeps the units with the largest mean square, and makes up for the others as usual."""

    def __init__(self) -> None:
        super().__init__(name="loudest")

    def order(self, consumer: Mapping[str, SliceStatistics]) -> Order:
        """Units by ``E[h²]``; every number of them loses what is lost with the first of these."""
        gram_nn = next(iter(consumer.values())).gram_II
        metric_nn = metric_of(list(consumer.values()))
        units = gram_nn.diagonal().argsort(descending=True, stable=True)
        lost = [_lost(gram_nn, metric_nn, units[:count]) for count in range(len(units) + 1)]
        return Order(units, torch.tensor(lost, dtype=torch.float64))


def _lost(gram_nn: torch.Tensor, metric_nn: torch.Tensor, kept: torch.Tensor) -> float:
    if len(kept) == len(gram_nn):
        return 0.0
    left = gram_nn
    if len(kept):
        block = gram_nn[kept][:, kept] + 1e-9 * torch.eye(len(kept), dtype=gram_nn.dtype)
        left = gram_nn - gram_nn[:, kept] @ torch.linalg.solve(block, gram_nn[kept])
    return max(0.5 * float((metric_nn * left).sum()), 0.0)


class Nothing:
    """No kind at all."""


class Raising(Loudest):
    """One that is never made."""

    def __init__(self) -> None:
        raise ValueError("never")


class Spaced(HiddenUnits):
    """One with a name that no plan can have."""

    def __init__(self) -> None:
        super().__init__(name="two words")


class Units(HiddenUnits):
    """One with the name of another."""


__all__ = ["Loudest", "Nothing", "Raising", "Spaced", "Units"]
