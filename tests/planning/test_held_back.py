"""Which batches judge a plan, and which it is made from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxshare.errors import CalibrationError
from fxshare.planning.held_back import hold_back


class Caller:
    """Calls of as many numbers as the batch's number, and one."""

    def __call__(self, batch: int) -> dict[str, Any]:
        return {"x": torch.zeros(batch + 1)}

    where_it_is = __call__


@pytest.mark.parametrize(
    ("count", "held"), [(2, [1]), (4, [3]), (10, [9]), (19, [9]), (25, [9, 19])]
)
def test_what_is_held_back_is_not_fitted(count: int, held: list[int]) -> None:
    captured: Any = SimpleNamespace(caller=Caller())
    data = hold_back(captured, range(count), "quick")
    assert [batch for _, batch in data.held_back] == held
    assert [len(call["x"]) for call, _ in data.held_back] == [batch + 1 for batch in held]
    assert list(data.fit) == [batch for batch in range(count) if batch not in held]
    assert data.sizes == [batch + 1 for batch in data.fit]


def test_without_a_search_nothing_is_held_back() -> None:
    captured: Any = SimpleNamespace(caller=Caller())
    data = hold_back(captured, range(3), "off")
    assert (list(data.fit), data.held_back) == ([0, 1, 2], [])


def test_one_batch_is_too_few_for_a_search() -> None:
    captured: Any = SimpleNamespace(caller=Caller())
    with pytest.raises(CalibrationError, match=r"at least 2 calibration batches.*found 1"):
        hold_back(captured, range(1), "quick")
