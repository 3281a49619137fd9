"""The original's output is kept where it is small, and only as long as it is what a run gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxshare.capture import check
from fxshare.capture.check import Original


class Doubling(nn.Module):
    """``2 x``; with ``writes`` the input is that afterwards."""

    def __init__(self, noted: Callable[[], None], *, writes: bool) -> None:
        super().__init__()
        self.noted = noted  # a function, which every copy calls
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        self.noted()
        return x.mul_(2).clone() if self.writes else 2 * x


def _three(*, writes: bool) -> tuple[list[Tensor], int]:
    """The outputs of a call, of another one and of the first again; and how often it was run."""
    runs = 0

    def noted() -> None:
        nonlocal runs
        runs += 1

    run = Original(Doubling(noted, writes=writes))
    first, other = {"x": torch.ones(3)}, {"x": torch.zeros(3)}
    return [run(call) for call in (first, other, first)], runs


def test_a_small_output_is_computed_once() -> None:
    found, runs = _three(writes=False)
    assert runs == 2
    assert found[2] is found[0]
    assert torch.equal(found[0], torch.full((3,), 2.0))


def test_a_large_output_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SMALL", 2)
    found, runs = _three(writes=False)
    assert runs == 3
    assert torch.equal(found[2], found[0])


def test_a_call_that_was_written_into_is_another_one() -> None:
    found, runs = _three(writes=True)
    assert runs == 3
    assert torch.equal(found[2], torch.full((3,), 4.0))
