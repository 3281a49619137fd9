"""The first-order part of a loss, on as few batches as its spread allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fxshare.planning.slope import slope

OLD = {"w": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([0.5])}
NEW = {"w": torch.tensor([2.0, 0.0])}, {"b": torch.tensor([1.5])}


class Quadratic:
    """Batches whose losses have known gradients at the old weights: ``g · (w, b)`` and a square,
    of which a central difference keeps nothing."""

    def __init__(self, gradients: list[float]) -> None:
        self.gradients = gradients
        self.asked: list[int] = []

    def substituted(self, weights: Any, biases: Any, what: object = None) -> Any:
        return weights, biases

    def losses(self, on: Any, which: Iterable[int]) -> list[float]:
        (weights, biases), which = on, list(which)
        self.asked += which
        moved = torch.cat([weights["w"] - OLD[0]["w"], biases["b"] - OLD[1]["b"]])
        return [float(self.gradients[n] * moved.sum() + 3 * moved.pow(2).sum()) for n in which]


def measured(gradients: list[float], predicted: float, tokens: list[float] | None = None) -> Any:
    judge: Any = Quadratic(gradients)
    found = slope(judge, tokens or [4.0] * len(gradients), OLD, NEW, predicted=predicted)
    return found, sorted(set(judge.asked)), len(judge.asked)


def test_batches_that_agree_need_no_fifth() -> None:
    found, asked, runs = measured([8.0] * 16, predicted=0.0)
    assert found.value == pytest.approx(8.0 * 0.0 / 4, abs=1e-6)  # the change sums to 1 - 2 + 1
    assert (asked, runs, found.tokens) == ([0, 1, 2, 3], 8, 16)


def test_the_mean_gradient_along_the_change_is_found() -> None:
    new = {"w": torch.tensor([2.0, 2.0])}, {"b": torch.tensor([0.5])}
    judge: Any = Quadratic([8.0, 6.0, 4.0, 2.0])
    found = slope(judge, [1.0, 1.0, 1.0, 1.0], OLD, new, predicted=0.0)
    assert found.value == pytest.approx(5.0)
    # the standard error of a mean of four, by Student's t of three degrees of freedom
    standard = torch.tensor([8.0, 6.0, 4.0, 2.0]).std().item() / 2
    assert found.error == pytest.approx(1.28 * standard)
    judge = Quadratic([8.0, 6.0])
    found = slope(judge, [3.0, 1.0], OLD, new, predicted=0.0)  # per token, not per batch
    assert found.value == pytest.approx(14 / 4)


@pytest.mark.parametrize(("spread", "batches"), [(0.1, 4), (1.0, 8), (3.0, 16), (50.0, 4)])
def test_as_many_batches_as_the_spread_asks_for(spread: float, batches: int) -> None:
    new = {"w": torch.tensor([2.0, 2.0])}, {"b": torch.tensor([0.5])}
    gradients = [5.0 + spread * (-1) ** at for at in range(16)]
    judge: Any = Quadratic(gradients)
    found = slope(judge, [1.0] * 16, OLD, new, predicted=0.0)
    assert sorted(set(judge.asked)) == list(range(batches))
    assert len(judge.asked) == 2 * batches  # no batch twice in one direction
    assert (found.error <= 0.1 * abs(found.value)) == (spread <= 1)


def test_what_is_predicted_besides_makes_a_spread_small() -> None:
    new = {"w": torch.tensor([2.0, 2.0])}, {"b": torch.tensor([0.5])}
    judge: Any = Quadratic([6.0, 4.0] * 8)
    slope(judge, [1.0] * 16, OLD, new, predicted=0.0)
    assert len(judge.asked) == 16
    judge = Quadratic([6.0, 4.0] * 8)
    slope(judge, [1.0] * 16, OLD, new, predicted=20.0)
    assert len(judge.asked) == 8


def test_one_batch_has_to_do() -> None:
    new = {"w": torch.tensor([2.0, 2.0])}, {"b": torch.tensor([0.5])}
    judge: Any = Quadratic([3.0])
    found = slope(judge, [2.0], OLD, new, predicted=1.0)
    assert (found.value, found.tokens) == (pytest.approx(1.5), 2)
