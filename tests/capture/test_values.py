"""Fake values are made once for operations that do the same, and never shared wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxshare.capture import capture
from fxshare.capture.tracing.trace import trace_once
from fxshare.capture.tracing.values import FakeValues, fake_mode
from tests.toys import TOYS, Toy

X = torch.arange(24.0).reshape(4, 6)


class Written(nn.Module):
    """``forward`` is a function of one tensor; a linear, so that there is something to capture."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def widths(x: Tensor) -> Tensor:
    """Two sums of one shape; the second is as it was after the first grew a dimension."""
    first, second = x + 1, x + 1
    first.unsqueeze_(0)
    return second.reshape(-1) if second.ndim == 2 else second.sum()


def sides(x: Tensor) -> Tensor:
    """Two products of one shape, wider than high; the second stays so when the first is turned."""
    first, second = x[:3] * 2, x[:3] * 2
    first.t_()
    return second.sum(0) if second.stride(0) > 1 else second.sum(1)


def kinds(x: Tensor) -> Tensor:
    """True, 1 and 1.0 are equal in Python, and give integers and floats in torch."""
    whole = x.long()
    added = [whole + True, whole + 1, whole + 1.0]
    assert [a.dtype for a in added] == [torch.int64, torch.int64, torch.float32]
    return added[2] + added[0]


def out_of_place(x: Tensor) -> Tensor:
    target = x * 2
    other = x * 2
    torch.cat([x, x], out=target)
    return other.sum(1) if other.shape[0] * 2 == target.shape[0] else other.sum(0)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("function", [widths, sides, kinds, out_of_place])
def test_what_is_traced_is_what_runs(function: Callable[[Tensor], Any]) -> None:
    model = Written(function).eval()
    found = capture(model, X, mode="fx")  # ends with a self-check against the model
    with torch.no_grad():
        torch.testing.assert_close(found.graph(X), model(X), rtol=0, atol=0)


def test_sharing_without_care_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeValues, "unshared", lambda self, value: value)
    for function in (widths, sides):
        with pytest.raises(Exception, match=r"self-check|failed|size|shape"):
            capture(Written(function).eval(), X, mode="fx")


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.relu(linear(norm(x))).reshape(x.shape[0], -1)
        return x


def computed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[int, fx.Graph]:
    """How many values a trace works out, and its graph."""
    count = 0
    compute = FakeValues._computed

    def counting(self: FakeValues, *given: Any) -> Any:
        nonlocal count
        count += 1
        return compute(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FakeValues, "_computed", counting)
        graph, _ = trace_once(model, {"x": X}, training=False)
    return count, graph


def test_a_deep_model_costs_what_a_shallow_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    few, shallow = computed(Deep(1), monkeypatch)
    many, deep = computed(Deep(24), monkeypatch)
    assert len(deep.nodes) > 15 * len(shallow.nodes)
    assert many == few


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_values_are_those_of_torch(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value that is looked up is what computing it again gives."""
    looked_up = 0
    of = FakeValues.of

    def checked(self: FakeValues, root: nn.Module, kind: str, target: Any, a: Any, k: Any) -> Any:
        nonlocal looked_up
        made = set(map(id, self._made.values()))
        value = of(self, root, kind, target, a, k)
        if id(value) in made:
            looked_up += 1
            module = root.get_submodule(target) if kind == "call_module" else None
            with self._mode, torch.no_grad():
                again = self._computed(kind, target, a, k, module)
            assert described(value) == described(again), (kind, target)
        return value

    monkeypatch.setattr(FakeValues, "of", checked)
    capture(toy.model(), toy.inputs(), mode="fx")
    assert looked_up > 0


def described(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        where = (value.device, value.dtype, value.layout, value.requires_grad)
        return (value.shape, value.stride(), value.storage_offset(), *where)
    return tuple(map(described, value)) if isinstance(value, tuple) else value


def test_a_constant_keeps_its_number() -> None:
    """What is made from numbers is known by them: two of one shape are two values."""
    values = FakeValues({}, fake_mode())
    root = nn.Module()
    one = values.of(root, "call_function", torch.tensor, (1,), {})
    two = values.of(root, "call_function", torch.tensor, (2,), {})
    assert [t.item() for t in (one, two)] == [1, 2]


def test_autocast_and_the_default_dtype_are_seen() -> None:
    values = FakeValues({}, fake_mode())
    root = nn.Module()
    x = values.fake(X)

    def dtypes() -> list[torch.dtype]:
        product = values.of(root, "call_function", torch.matmul, (x, x.t()), {})
        made = values.of(root, "call_function", torch.ones, (3,), {})
        return [product.dtype, made.dtype]

    assert dtypes() == [torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtypes()[0] == torch.bfloat16
    try:
        torch.set_default_dtype(torch.float64)
        assert dtypes()[1] == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes() == [torch.float32, torch.float32]
