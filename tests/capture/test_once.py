"""A model that is captured again on an equal example is not, where captures are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxshare.capture import capture
from fxshare.capture.once import captures_kept
from fxshare.errors import CaptureError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_an_equal_example_is_captured_once(model: nn.Module) -> None:
    x = torch.randn(3, 4)
    with captures_kept():
        first = capture(model, {"input": x})
        assert capture(model, {"input": x.clone()}, needs=("0", "2")) is first
        # any difference counts
        assert capture(model, {"input": x + 1}) is not first
        assert capture(model, {"input": x.double().float()[:2]}) is not first
        assert capture(model, (x,)) is not first
        assert capture(model, {"input": x}, mode="fx") is not first
        other = nn.Sequential(*model)
        assert capture(other, {"input": x}).model is other
        assert capture(model, {"input": x}, relaxed=()) is not first
    assert capture(model, {"input": x}) is not first


def test_an_inner_scope_has_captures_of_its_own(model: nn.Module) -> None:
    x = torch.randn(3, 4)
    with captures_kept():
        first = capture(model, x)
        with captures_kept():
            assert capture(model, x) is not first
        assert capture(model, x) is first


def test_what_failed_is_not_kept(model: nn.Module) -> None:
    with captures_kept():
        for _ in range(2):
            with pytest.raises(CaptureError):
                capture(model, torch.randn(3, 5), mode="fx")
