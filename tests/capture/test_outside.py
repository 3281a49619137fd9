"""Modules that are not in the tree, weights behind closures, device types, and cache switches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.capture import capture
from fxshare.capture.caller import Caller
from fxshare.errors import CaptureError, GuardError
from passes.graph.graph import linear_calls, structure_copy
from tests.toys import WIDTH

TYPES = {"weight_types": {"w": {"pattern": r"layers\.\d\.0"}}}


class Stack(nn.Module):
    """Two linears in a list, and what is between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        y: Tensor = self.layers[1](x if self.between is None else self.between(self, x))
        return y


def doubled(_: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * 2)(x)


def slope(_: Any, x: Tensor) -> Tensor:
    y: Tensor = torch.func.grad(lambda t: (t**3).sum())(x)
    return y


def inputs(batch: int = 3, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def same(model: nn.Module, gm: nn.Module) -> bool:
    with torch.no_grad():
        x = inputs(2, 7, 1)
        return worst(model(x), gm(x)).relative <= tolerance(torch.float32, 4)


# Modules without weights


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: nn.Softmax(-1)(x),
        lambda m, x: {"gelu": nn.GELU()}["gelu"](x),
        lambda m, x: nn.Sequential(nn.SiLU(), nn.LayerNorm(WIDTH, elementwise_affine=False))(x),
        lambda m, x: functools.partial(F.softmax, dim=-1)(x),
        lambda m, x: nn.Dropout(0.0)(x),
    ],
    ids=["made", "dict", "nested", "partial", "dropout"],
)
def test_a_module_without_weights_is_traced_through(
    between: Callable[[Any, Tensor], Tensor],
) -> None:
    model = Stack(between).eval()
    captured = capture(model, inputs())
    assert captured.front_end == "fx"
    assert same(model, captured.graph)
    assert not any("_tensor_constant" in str(n.target) for n in captured.graph.graph.nodes)


def test_activations_in_a_plain_list_are_traced_through() -> None:
    model = Stack(lambda m, x: m.activations[1](x)).eval()
    model.activations = [nn.ReLU(), nn.GELU()]
    captured = capture(model, inputs())
    assert captured.front_end == "fx"
    assert same(model, captured.graph)


# Weights behind a list or a closure


def patched(model: Stack) -> Stack:
    inner = model.layers[0].forward
    model.layers[0].forward = lambda x: inner(x) * 3  # type: ignore[method-assign]
    return model


def listed(model: Stack) -> Stack:
    model.again = [model.layers[0]]
    model.between = lambda m, x: m.again[0](x)
    return model


def tied(model: Stack) -> Stack:
    other = nn.Linear(WIDTH, WIDTH)
    other.weight, other.bias = model.layers[1][0].weight, model.layers[1][0].bias
    model.other = {"tied": other}
    model.between = lambda m, x: m.other["tied"](x)
    return model


@pytest.mark.parametrize("patch", [patched, listed, tied])
def test_weights_behind_a_closure_or_a_list_are_the_models(patch: Callable[[Stack], Stack]) -> None:
    model = patch(Stack().eval())
    gm = fxshare.compile(model, TYPES, example=inputs())
    report = gm.fxshare.report
    assert report.front_end == "fx"
    assert report.parameters_after == report.parameters_before
    assert same(model, gm)
    names = {call.name for call in linear_calls(capture(model, inputs()).graph)}
    assert names == {"layers.0.0", "layers.1.0"}


@pytest.mark.parametrize("patch", [patched, listed])
def test_at_module_granularity_a_closure_reaches_what_was_rewritten(
    patch: Callable[[Stack], Stack],
) -> None:
    model = patch(Stack().eval())
    gm = fxshare.compile(model, TYPES, capture="modules", copy=True)
    assert same(model, gm)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    assert not same(model, gm)
    with torch.no_grad():
        assert float(gm(inputs()).abs().max()) == 0.0


def test_what_is_saved_of_a_patched_model_is_loaded(tmp_path: Any) -> None:
    model = patched(Stack().eval())
    gm = fxshare.compile(model, TYPES, example=inputs())
    fxshare.save(gm, tmp_path / "saved")
    assert same(model, fxshare.load(tmp_path / "saved", model=patched(Stack().eval())))


def test_a_copy_has_closures_of_its_own_and_the_original_keeps_its() -> None:
    model = patched(Stack().eval())
    noted: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda m, i, o: noted.append(o))
    before = model.layers[0].forward
    copy = structure_copy(model, clone_parameters=True)
    with torch.no_grad():
        copy.layers[0][0].weight.zero_()
        copy.layers[0][0].bias.zero_()
        assert float(copy.layers[0](inputs()).abs().max()) == 0.0
        assert float(model.layers[0](inputs()).abs().max()) > 0.0
        copy(inputs())
    assert model.layers[0].forward is before
    assert len(noted) == 1  # what a hook appends to is still the user's list


def own_list(model: Stack) -> Stack:
    model.extra = [nn.Linear(WIDTH, WIDTH)]
    model.between = lambda m, x: m.extra[0](x)
    return model


def own_closure(model: Stack) -> Stack:
    extra = nn.Linear(WIDTH, WIDTH)
    model.between = lambda m, x: extra(x)
    return model


def own_tensor(model: Stack) -> Stack:
    extra = torch.ones(WIDTH, requires_grad=True)
    model.between = lambda m, x: x * extra
    return model


@pytest.mark.parametrize("patch", [own_list, own_closure, own_tensor])
def test_weights_that_the_model_does_not_know_are_not_baked(
    patch: Callable[[Stack], Stack],
) -> None:
    model = patch(Stack().eval())
    for mode in ("fx", "export"):
        with pytest.raises(CaptureError, match=r"not among its parameters.*register") as caught:
            capture(model, inputs(), mode=mode)  # type: ignore[arg-type]
        assert str(WIDTH) in str(caught.value)
    gm = fxshare.compile(model, TYPES, example=inputs())
    assert gm.fxshare.front_end == "modules"
    assert gm.fxshare.report.parameters_after == gm.fxshare.report.parameters_before
    assert same(model, gm)


def test_an_export_does_not_bake_a_tied_weight() -> None:
    with pytest.raises(CaptureError, match=r"a constant of 'layers\.1\.0\.weight', which Stack al"):
        capture(tied(Stack().eval()), inputs(), mode="export")


# Devices


def on_device(m: Any, x: Tensor) -> Tensor:
    if x.device.type == "cuda" or x.is_cuda or "cuda" in str(x.device):
        x = x * 2
    if x.device.type != "meta" and x.dtype.is_floating_point:
        x = x * {"cpu": 1.5, "cuda": 2.0}[x.device.type]
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    return x + torch.zeros(x.shape[0], 1, WIDTH, device=x.device)


def test_device_types_are_asked_for_and_held() -> None:
    model = Stack(on_device).eval()
    captured = capture(model, inputs())
    assert captured.front_end == "fx"
    assert same(model, captured.graph)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(GuardError, match="test_outsi"):
        captured.graph(inputs())


# The cache


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        y = self.linear(x)
        return (y, object()) if use_cache else (y,)


class Outer(nn.Module):
    """Hands its keywords on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.inner(x, **options)


def test_the_cache_is_switched_off_where_the_switch_is_among_other_keywords() -> None:
    model = Outer(Inner()).eval()
    captured = capture(model, inputs())
    assert captured.front_end == "fx"
    assert captured.caller(inputs())["use_cache"] is False
    assert worst(model(inputs(), use_cache=False), captured.graph(inputs())).relative == 0.0
    assert Caller(model)({"x": inputs(), "use_cache": True})["use_cache"] is True


def test_a_model_that_refuses_the_switch_is_called_without() -> None:
    class Refuses(Outer):
        def forward(self, x: Tensor, **options: Any) -> Any:
            if options:
                raise TypeError(f"unexpected {options}")
            return self.inner(x, use_cache=False)

    captured = capture(Refuses(Inner()).eval(), inputs())
    assert captured.front_end == "fx"
    assert "use_cache" not in captured.caller(inputs())


@pytest.mark.parametrize("between", [doubled, slope])
def test_regions_of_vmap_and_func_are_in_no_graph_of_export(between: Any) -> None:
    """torch.export writes their entry and exit as calls that nothing reads, and dead code goes."""
    model = Stack(between).eval()
    with pytest.raises(CaptureError):
        capture(model, inputs(), mode="export")
    gm = fxshare.compile(model, TYPES, example=inputs(), copy=True)
    assert gm.fxshare.report.front_end == "modules"
    assert same(model, gm)


def test_a_region_of_vmap_is_refused_with_the_way_out() -> None:
    with pytest.raises(CaptureError, match=r"vmap or torch\.func.*capture='modules'"):
        capture(Stack(doubled).eval(), inputs(), mode="export")


# What is kept from one call to the next


def remembered(model: Any, x: Tensor) -> Tensor:
    """The call before counts, where it was of this shape."""
    before = getattr(model, "before", None)
    model.before = x
    return x if before is None or before.shape != x.shape else x + before


def collected(model: Any, x: Tensor) -> Tensor:
    model.kept = [*getattr(model, "kept", []), x.mean()]
    return x + sum(model.kept)


def once(model: Any, x: Tensor) -> Tensor:
    """The same numbers at every call, computed at the first."""
    model.table = getattr(model, "table", None) or [0.5]
    return x * model.table[0]


@pytest.mark.parametrize("between", [remembered, collected])
@pytest.mark.parametrize("mode", ["fx", "export"])
def test_a_graph_that_forgets_what_the_model_keeps_is_refused(between: Any, mode: Any) -> None:
    model = Stack(between).eval()
    with pytest.raises(CaptureError, match=r"a second time.*capture='modules'"):
        capture(model, inputs(), mode=mode)
    gm = fxshare.compile(model, TYPES, example=inputs(), copy=True)
    assert gm.fxshare.report.front_end == "modules"
    assert same(model, gm)
    assert same(model, gm)  # by now both remember


def test_what_is_computed_once_and_kept_is_in_the_graph() -> None:
    model = Stack(once).eval()
    gm = fxshare.compile(model, TYPES, example=inputs(), copy=True)
    assert gm.fxshare.report.front_end == "fx"
    for _ in range(2):
        assert same(model, gm)
