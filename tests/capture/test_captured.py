"""What is captured runs the same way whatever it is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxshare.capture import capture

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Takes a number, which is a constant in a graph and an argument of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


@pytest.mark.parametrize(("mode", "side_by_side"), [("fx", False), ("modules", True)])
def test_a_call_runs_on_what_computes_the_function(mode: Any, side_by_side: bool) -> None:
    model = Scaled().eval()
    captured = capture(model, {"x": X, "scale": 2.0}, mode=mode)
    assert captured.side_by_side is side_by_side
    assert captured.module is (model if side_by_side else captured.graph)
    call = captured.caller({"x": X, "scale": 2.0})
    torch.testing.assert_close(captured.run(call), model(X, 2.0), rtol=0, atol=0)
    other = copy.deepcopy(captured.module)
    with torch.no_grad():
        other.get_submodule("fc").get_parameter("bias").add_(1)
    moved = captured.computing(other)
    torch.testing.assert_close(moved.run(call), model(X, 2.0) + 2)
    torch.testing.assert_close(captured.run(call), model(X, 2.0), rtol=0, atol=0)
