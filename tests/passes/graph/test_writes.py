"""Which nodes write, and which values are written to, directly or through a view."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.graph.writes import is_in_place, is_written, sharing_memory

Function = Callable[[Tensor], object]


class Wrapped(nn.Module):
    """``x = clone(input)``, then the body."""

    def __init__(self, body: Function) -> None:
        super().__init__()
        self.body = body
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(4)

    def forward(self, input: Tensor) -> object:
        x = input.clone()
        return x + 1, self.body(x)


def _value(body: Function, *, export: bool = False) -> fx.Node:
    """The node ``x`` of the traced body."""
    model = Wrapped(body)
    if export:
        gm = torch.export.export(model, (torch.randn(4, 4),)).module()
    else:
        gm = fx.symbolic_trace(model)
    return next(n for n in gm.graph.nodes if "clone" in n.name)


WRITES: dict[str, Function] = {
    "method": lambda x: x.add_(1),
    "function": lambda x: torch.relu_(x),
    "setitem": lambda x: x.__setitem__(0, 1.0),
    "out": lambda x: torch.add(x, 1, out=x),
    "keyword": lambda x: F.relu(x, inplace=True),
    "by position": lambda x: F.relu(x, True),
    "view": lambda x: x.view(-1).mul_(2),
    "view of a view": lambda x: x.view(2, 8).transpose(0, 1)[1].mul_(2),
    "split": lambda x: x.split(2)[0].mul_(2),
    "chunk function": lambda x: torch.chunk(x, 2)[1].zero_(),
    "reshape": lambda x: torch.reshape(x, (-1,)).mul_(2),
    "contiguous": lambda x: x.contiguous().mul_(2),
    "to": lambda x: x.to(torch.float32).mul_(2),
    "dropout": lambda x: F.dropout(x, 0.1, False).mul_(2),
    "einsum": lambda x: torch.einsum("ii->i", x).mul_(2),
    "unknown method": lambda x: x.float().mul_(2),
}
READS: dict[str, Function] = {
    "arithmetic": lambda x: (x * 2 - 1) / 3,
    "then in place": lambda x: (x * 2).add_(1),
    "matmul": lambda x: torch.matmul(x, x).mul_(2),
    "softmax": lambda x: F.softmax(x, -1).mul_(2),
    "layer norm": lambda x: F.layer_norm(x, (4,)).mul_(2),
    "clone": lambda x: x.clone().mul_(2),
    "views": lambda x: x.view(-1).sum(),
    "not in place": lambda x: F.relu(x, False),
}


@pytest.mark.parametrize("name", WRITES)
def test_written(name: str) -> None:
    assert is_written(_value(WRITES[name]))


@pytest.mark.parametrize("name", READS)
def test_not_written(name: str) -> None:
    assert not is_written(_value(READS[name]))


@pytest.mark.parametrize("name", ["method", "view of a view", "split", "dropout"])
def test_written_at_aten_level(name: str) -> None:
    assert is_written(_value(WRITES[name], export=True))


@pytest.mark.parametrize("name", ["then in place", "softmax", "views"])
def test_not_written_at_aten_level(name: str) -> None:
    assert not is_written(_value(READS[name], export=True))


def test_modules() -> None:
    class Modules(Wrapped):
        def forward(self, input: Tensor) -> Tensor:
            written = self.relu(input.clone())
            through = self.drop(input.neg())
            self.relu(through)
            fresh = self.norm(input.abs())
            self.relu(fresh)
            return written

    nodes = {n.name: n for n in fx.symbolic_trace(Modules(torch.neg)).graph.nodes}
    assert is_in_place(nodes["relu"])
    assert not is_in_place(nodes["drop"])
    assert is_written(nodes["clone"])
    assert is_written(nodes["neg"])  # dropout in eval hands back its input
    assert not is_written(nodes["abs_1"])
    assert is_written(nodes["norm"])


def test_a_view_of_what_is_written_is_written_too() -> None:
    def body(input: Tensor) -> Tensor:
        base = input.clone()
        view = base.view(-1)
        first = view.sum()
        base.add_(1)
        return first + view.sum()

    nodes = {n.name: n for n in fx.symbolic_trace(body).graph.nodes}
    assert is_written(nodes["view"])
    assert not is_written(nodes["input_1"])


def test_what_an_operator_in_place_gives_shares_memory_with_what_it_writes_into() -> None:
    """And an assignment to an item gives nothing that does."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    summed = graph.call_function(operator.iadd, (x, y))
    item = graph.call_function(operator.setitem, (y, 0, 1.0))
    graph.output((summed, item))
    assert sharing_memory(x) == sharing_memory(summed) == {x, summed}
    assert sharing_memory(y) == {y}


@pytest.mark.parametrize("op", [operator.and_, operator.or_])
def test_operators_named_like_python_keywords_write_nothing(op: Callable[..., object]) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    both = graph.call_function(op, (x, y))
    graph.output(both)
    fx.GraphModule(nn.Module(), graph)
    assert not is_in_place(both)
    assert not is_written(x)
