"""CleanUp: what goes, and what stays although nothing reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from passes import CleanUp, equal_outputs, run
from passes.errors import FxShareError
from tests.toys import LLAMA_LIKE


@has_side_effect
def refuse_negative(x: Tensor) -> None:
    """A guard, as capture puts them into graphs."""
    if bool((x < 0).any()):
        raise FxShareError("negative")


fx.wrap("refuse_negative")


class Body(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.tanh = nn.Tanh()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        self.body(self, x)
        return self.used(x)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.add_(1),
        lambda m, x: x.view(-1).add_(1),
        lambda m, x: m.relu(x),
        lambda m, x: F.relu(x, inplace=True),
        lambda m, x: F.relu(x, True),
        lambda m, x: torch.relu_(x),
        lambda m, x: torch.add(x, 1, out=x),
        lambda m, x: x.__setitem__(0, 1.0),
    ],
    ids=["method", "view", "module", "keyword", "position", "function", "out", "setitem"],
)
def test_writes_stay(body: Callable[[nn.Module, Tensor], object]) -> None:
    gm = fx.symbolic_trace(Body(body))
    result, (applied,) = run(gm, [CleanUp()])
    assert applied.rewrites == 0
    assert equal_outputs(gm, result, [torch.randn(2, 4)], tolerance=0.0)


@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (lambda m, x: m.unused(x), 1),
        (lambda m, x: torch.tanh(m.tanh(x) + x.view(-1)[0]), 5),
        (lambda m, x: m.unused.weight, 1),
        (lambda m, x: F.relu(x, False), 1),
    ],
    ids=["module", "chain", "parameter", "function"],
)
def test_what_nothing_reads_goes(body: Callable[[nn.Module, Tensor], object], gone: int) -> None:
    gm = fx.symbolic_trace(Body(body))
    result, (applied,) = run(gm, [CleanUp()])
    assert applied.rewrites == gone
    assert set(result.state_dict()) == {"used.weight", "used.bias"}
    assert equal_outputs(gm, result, [torch.randn(2, 4)], tolerance=0.0)
    assert run(result, [CleanUp()])[1][0].rewrites == 0


def test_guards_stay_and_hold() -> None:
    gm = fx.symbolic_trace(Body(lambda m, x: refuse_negative(x)))
    result, (applied,) = run(gm, [CleanUp()])
    assert applied.rewrites == 0
    with pytest.raises(FxShareError, match="negative"):
        result(-torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_guards_of_torch_export_stay() -> None:
    gm = torch.export.export(nn.Linear(4, 3), (torch.randn(2, 4),)).module()
    result, _ = run(gm, [CleanUp()])
    with pytest.raises(AssertionError, match="Guard failed"):
        result(torch.randn(5, 4))


def test_placeholders_stay() -> None:
    def ignores(x: Tensor, unused: Tensor | None = None) -> Tensor:
        return x + 1

    result, (applied,) = run(fx.symbolic_trace(ignores), [CleanUp()])
    assert applied.rewrites == 0
    assert [n.target for n in result.graph.nodes if n.op == "placeholder"] == ["x", "unused"]


def test_a_method_that_no_tensor_has_stays() -> None:
    class Cache:
        def __init__(self) -> None:
            self.resets = 0

        def reset(self) -> None:
            self.resets += 1

    def forward(x: Tensor, cache: Cache) -> Tensor:
        cache.reset()
        return x + 1

    result, _ = run(fx.symbolic_trace(forward), [CleanUp()])
    cache = Cache()
    result(torch.ones(2), cache)
    assert cache.resets == 1


def test_modules_and_tensors_that_no_node_uses_go() -> None:
    gm = fx.symbolic_trace(LLAMA_LIKE.model())
    gm.add_module("left_over", nn.Linear(2, 2))
    gm.layers.register_parameter("stray", nn.Parameter(torch.ones(3)))
    gm.register_buffer("root_stray", torch.ones(3))
    result, (applied,) = run(gm, [CleanUp()])
    assert applied.rewrites == 0  # nodes are counted, and none went
    assert not hasattr(result, "left_over")
    assert not hasattr(result.layers, "stray")
    assert not hasattr(result, "root_stray")
    assert hasattr(gm, "left_over")
    assert hasattr(gm, "root_stray")


def test_everything_below_a_called_module_stays() -> None:
    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.MultiheadAttention)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x)[0] + self.shift

    model = Attends()
    gm = fx.GraphModule(model, Leaf().trace(model))
    result, _ = run(gm, [CleanUp()])
    assert set(result.state_dict()) == set(model.state_dict())
    assert equal_outputs(gm, result, [torch.randn(2, 3, 4)], tolerance=0.0)
