"""Operations element by element, computed again in the backward pass: the same, with less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxshare.calibration.again import elementwise_again
from fxshare.capture import capture


class Written(nn.Module):
    """GPT-2's activation written out, between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        inner = 0.8 * (h + 0.044715 * torch.pow(h, 3.0))
        return self.second(0.5 * h * (1.0 + torch.tanh(inner)))


class Gated(Written):
    """Of two products."""

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.sigmoid(self.first(x)) * self.first(x + 1) * self.first(x - 1))


class WritesAfter(Written):
    """What was read is another when it would be read again."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(x) * 2
        y = self.second(torch.tanh(h * 1.5).sigmoid())
        return y, h.detach().add_(1).sum()


class ReadTwice(Written):
    """A step is read by others, too."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        inner = torch.tanh(h * 1.5)
        return self.second(inner.sigmoid()), inner.sum(), inner.shape[0] * 2


def saved(gm: nn.Module, x: Tensor) -> tuple[int, Tensor, Tensor]:
    sizes: dict[int, int] = {}
    kept = []

    def pack(one: Tensor) -> Tensor:
        sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        kept.append(one)  # an address is one tensor's while it is kept
        return one

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        out = gm(x)
    y = out if isinstance(out, Tensor) else out[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return sum(sizes.values()), y.detach(), gradient


@pytest.mark.parametrize(
    ("of", "stretches"), [(Written, 1), (Gated, 1), (WritesAfter, 0), (ReadTwice, 1)]
)
def test_outputs_and_gradients_are_the_same(of: type[Written], stretches: int) -> None:
    torch.manual_seed(0)
    gm = fx.symbolic_trace(of())
    again = elementwise_again(gm)
    calls = [n for n in again.graph.nodes if str(n.target).startswith("again_")]
    assert len(calls) == stretches
    x = torch.randn(50, 6)
    (before, y, gradient), (after, y_again, gradient_again) = saved(gm, x), saved(again, x)
    assert torch.equal(y, y_again)
    assert torch.equal(gradient, gradient_again)
    if of is Written:
        assert before - after >= 2 * 50 * 64 * 4
    # the graph that was given is as it was, and its parameters are those of the copy
    assert all(not str(n.target).startswith("again_") for n in gm.graph.nodes)
    assert next(again.parameters()) is next(gm.parameters())


def test_a_graph_that_holds_eval_mode_alone_is_run_in_it() -> None:
    """As torch.export makes them."""
    model, x = Written().eval(), torch.randn(4, 6)
    graph = capture(model, {"x": x}, mode="export").graph
    again = elementwise_again(graph)
    assert any("again" in str(node.target) for node in again.graph.nodes)
    torch.testing.assert_close(again(x)[0], model(x))
