"""Linears whose weight is a bare parameter: every way to multiply by one, and stacks of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxshare.capture import capture
from passes import (
    RequiresError,
    Rows,
    SplitLinear,
    SplitSite,
    UnstackExperts,
    equal_outputs,
    linear_calls,
    run,
    stacks,
)
from passes.graph.graph import new_linear, put_module

I, O = 6, 10  # noqa: E741 - the legend of the package: input and output features

Multiply = Callable[[Tensor, Tensor], Tensor]
# (out, in) weights, then (in, out) ones
BY_ROWS: dict[str, Multiply] = {
    "F.linear": lambda x, w: F.linear(x, w),
    "@ .T": lambda x, w: x @ w.T,
    "@ .mT": lambda x, w: x @ w.mT,
    "matmul t()": lambda x, w: torch.matmul(x, w.t()),
    "matmul transpose": lambda x, w: x.matmul(w.transpose(-2, -1)),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "einsum dots": lambda x, w: torch.einsum("...i, oi -> ...o", x, w),
}
BY_COLUMNS: dict[str, Multiply] = {
    "@": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("bti,io->bto", x, w),
}
# these are no linear of the last dimension, or not of a matrix as it is stored
OTHERS: dict[str, Multiply] = {
    "contracts tokens": lambda x, w: torch.einsum("bti,ot->bio", x, w[:, :5]),
    "swaps outputs": lambda x, w: torch.einsum("bti,oi->bot", x, w),
    "a scaled weight": lambda x, w: x @ (w * 2.0).T,
    "every other row": lambda x, w: F.linear(x, w[::2]),
    "the weight first": lambda x, w: w @ x.mT,
}


class Multiplies(nn.Module):
    def __init__(self, multiply: Multiply, shape: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.table)


def _graph(multiply: Multiply, shape: tuple[int, int]) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Multiplies(multiply, shape), torch.randn(2, 5, I).double(), mode="fx").graph


@pytest.mark.parametrize(("multiply", "transposed"), [
    *(pytest.param(m, False, id=f"rows {n}") for n, m in BY_ROWS.items()),
    *(pytest.param(m, True, id=f"columns {n}") for n, m in BY_COLUMNS.items()),
])  # fmt: skip
def test_a_parameter_becomes_linears(multiply: Multiply, transposed: bool) -> None:
    gm = _graph(multiply, (I, O) if transposed else (O, I))
    (call,) = linear_calls(gm)
    assert (call.name, call.transposed) == ("table", transposed)
    assert call.weight_OI.shape == (O, I)
    assert call.weight_OI.requires_grad
    rows = (Rows("table.a", 0, 3), Rows("table.b", 3, O))
    result, _ = run(
        gm, [SplitLinear(sites=(SplitSite(("table",), rows),))], expect={"split-linear": 1}
    )
    x = torch.randn(3, 4, I, dtype=torch.float64)
    assert equal_outputs(gm, result, [x], tolerance=1e-13)
    assert sorted(dict(result.named_parameters())) == ["table.a.weight", "table.b.weight"]


@pytest.mark.parametrize("multiply", OTHERS.values(), ids=OTHERS)
def test_other_products_are_no_linear(multiply: Multiply) -> None:
    assert not linear_calls(_graph(multiply, (O, I)))


def test_a_buffer_that_is_multiplied_is_no_linear() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(I, O))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    assert not linear_calls(capture(Fixed(), torch.randn(2, 5, I), mode="fx").graph)


def test_rows_are_linears_of_their_own_and_all_or_nothing() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([F.linear(x.tanh(), w[:4]), F.linear(x, w[4:])], dim=-1)

    gm = _graph(both, (O, I))
    names = [call.name for call in linear_calls(gm)]
    assert names == ["table.rows_0_4", "table.rows_4_10"]
    first = SplitSite((names[0],), (Rows("table.a", 0, 4),))
    sites = [first, SplitSite((names[1],), (Rows("table.b", 0, 6),))]
    result, _ = run(gm, [SplitLinear(sites=tuple(sites))], expect={"split-linear": 2})
    x = torch.randn(3, 4, I, dtype=torch.float64)
    assert equal_outputs(gm, result, [x], tolerance=1e-13)
    # the other part still reads the parameter that splitting takes away
    with pytest.raises(RequiresError, match="is also used by node"):
        run(gm, [SplitLinear(sites=(sites[0],))])


# Stacks of experts

EXPERTS = 3


class Experts(nn.Module):
    """What transformers' ``batched_mm`` does with one of its stacks."""

    def __init__(self, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        shape = (EXPERTS, I, O) if transposed else (EXPERTS, O, I)
        self.up = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        if bias:
            self.up_bias = nn.Parameter(torch.randn(EXPERTS, O, dtype=torch.float64))
        self.transposed, self.bias = transposed, bias

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        weights = self.up[experts]
        if self.transposed:
            y = torch.bmm(x.unsqueeze(1), weights).squeeze(1)
        else:
            y = torch.bmm(weights, x.unsqueeze(-1)).squeeze(-1)
        if self.bias:
            y.add_(self.up_bias[experts])
        return y


def _experts(**options: bool) -> tuple[fx.GraphModule, list[Any]]:
    torch.manual_seed(0)
    x = torch.randn(7, I, dtype=torch.float64)
    chosen = torch.tensor([2, 0, 2, 2, 0, 0, 2])  # nobody wants 1
    return capture(Experts(**options), (x, chosen), mode="fx").graph, [x, chosen]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_unstacked_experts_are_equal(transposed: bool, bias: bool) -> None:
    gm, inputs = _experts(transposed=transposed, bias=bias)
    (stack,) = stacks(gm)["up"]
    assert (stack.transposed, stack.bias) == (transposed, "up_bias" if bias else None)
    text = str(gm.graph)
    result, _ = run(gm, [UnstackExperts(parameters=("up",))], expect={"unstack-experts": 1})
    assert str(gm.graph) == text
    assert equal_outputs(gm, result, inputs, tolerance=1e-13)
    assert [call.name for call in linear_calls(result)] == ["up.0", "up.1", "up.2"]
    owner = gm.up if not transposed else gm.up.transpose(1, 2)
    assert linear_calls(result)[1].weight_OI.data_ptr() == owner[1].data_ptr()  # nothing is copied


def test_two_experts_in_each_others_place_are_caught() -> None:
    gm, inputs = _experts()
    result, _ = run(gm, [UnstackExperts(parameters=("up",))])
    for name, other in (("up.0", "up.2"), ("up.2", "up.0")):
        weight = gm.up[int(other[-1])]
        put_module(result, name, new_linear(weight, None, requires_grad=True, training=True))
    assert not equal_outputs(gm, result, inputs, tolerance=1e-3)


def test_a_stack_that_is_read_otherwise_is_refused() -> None:
    class Sums(Experts):
        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            return super().forward(x, experts) + self.up.sum()

    gm = capture(Sums(), _experts()[1], mode="fx").graph
    assert not stacks(gm)
    with pytest.raises(RequiresError, match="'up' is not read as a stack of experts only"):
        run(gm, [UnstackExperts(parameters=("up",))])
