"""What stands around a model is taken off, or refused by name; hooks on the model itself stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.errors import CalibrationError, CaptureError, FxShareWarning
from fxshare.models.wrapped import unwrapped
from tests.capture.test_contract import CONFIG, GRAPHS, Net, X, Y, assert_same, compiled, refused


class Plain(Net):
    def forward(self, x: Tensor, mode: str = "plain") -> Tensor:
        return self.run(x) * (5 if mode == "five" else 1)


def wrapped_by_a_compiler(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def doubly(model: nn.Module) -> Any:
    return wrapped_by_a_compiler(nn.DataParallel(model))


AROUND = (wrapped_by_a_compiler, nn.DataParallel, torch.optim.swa_utils.AveragedModel, doubly)


@pytest.mark.parametrize("wrap", AROUND)
def test_what_calls_the_model_as_it_is_called_is_taken_off(wrap: Callable[..., Any]) -> None:
    outer = wrap(Plain().eval())
    gm = compiled(outer, X)
    assert [site.name for site in gm.fxshare.plan.sites] == ["first", "second"]
    assert_same(Plain().eval(), gm, Y)
    assert fxshare.verify(outer, gm).ok
    assert fxshare.plan(outer, CONFIG) == fxshare.plan(Plain(), CONFIG)


def test_a_process_group_is_taken_off_too() -> None:
    class DistributedDataParallel(nn.parallel.DistributedDataParallel):
        """Without a process group, which only its constructor needs."""

        forward = nn.parallel.DistributedDataParallel.forward

        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module, self.mixed_precision = module, None

    inner = Plain()
    outer = DistributedDataParallel(inner)
    assert unwrapped(outer) is inner
    outer.mixed_precision = "half"
    with pytest.raises(CaptureError, match="casts to another precision; compile what is inside"):
        unwrapped(outer)


def test_a_wrapper_that_does_something_itself_is_refused() -> None:
    class Doubling(nn.DataParallel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    with pytest.raises(CaptureError, match=r"around Plain has a forward of its own.*model\.module"):
        compiled(Doubling(Plain()), X)
    hooked = nn.DataParallel(Plain())
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(CaptureError, match="around Plain has forward hooks"):
        compiled(hooked, X)


class FSDPModule(nn.Module):
    """Named as torch names what it makes of a module that it shards."""


class Sharded(FSDPModule, Plain):
    pass


@pytest.mark.parametrize("inside", [False, True])
def test_sharded_weights_are_refused_by_name(inside: bool) -> None:
    model = Sharded()
    outer = nn.Sequential(model) if inside else model
    where = "its module '0' is" if inside else "is"
    with pytest.raises(CaptureError, match=f"{where} a FSDPModule") as caught:
        compiled(outer, X)
    assert "full_state_dict=True" in str(caught.value)


@pytest.mark.parametrize("function", [fxshare.compile, fxshare.plan])
def test_torchscript_is_refused_by_name(function: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"a ScriptModule: TorchScript.*was scripted or traced"):
        function(torch.jit.trace(Plain(), X), CONFIG, example=X)


def test_a_wrapper_of_ones_own_is_named_with_the_way_out() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    inside = {"weight_types": {"w": {"pattern": r"inner\.(first|second)"}}}
    model = Around().eval()
    with pytest.raises(CalibrationError, match=r"compile what is inside \(model\.inner\)"):
        fxshare.compile(model, inside, example=X)
    assert_same(model, fxshare.compile(model, inside, example={"x": X}), x=Y)


# Hooks on the model itself


def double(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * args[0], *args[1:])


def test_a_hook_on_the_model_stays_or_is_named(tmp_path: Path) -> None:
    model = Plain().eval()
    model.register_forward_pre_hook(double)
    for capture in GRAPHS:
        with pytest.raises(CaptureError, match=r"itself has a forward pre-hook \(.*\.double\)"):
            compiled(model, X, capture)
    gm = compiled(model, X)
    assert gm.fxshare.front_end == "modules"
    assert "capture='modules'; to have a graph, remove it" in gm.fxshare.report.notes[0]
    assert_same(model, gm, Y)
    sharing = {**CONFIG, "group_size": 1, "compression_rate": 0.3}
    fxshare.compile(model, sharing, calibration=[X, Y])  # run as users call it, by position
    with pytest.warns(FxShareWarning, match="no folder holds: register them again"):
        fxshare.save(gm, tmp_path / "saved")


# A forward of the instance


@pytest.mark.parametrize("capture", [*GRAPHS, "modules"])
def test_a_forward_with_arguments_filled_in(capture: str) -> None:
    model = Plain().eval()
    model.forward = functools.partial(model.forward, mode="five")  # type: ignore[method-assign]
    gm = compiled(model, X, capture)
    assert_same(model, gm, Y)
    with torch.no_grad():
        assert torch.allclose(gm(Y), Plain().eval()(Y, "five"))
    if capture != "modules":
        with refused("mode='five'"):
            gm(Y, mode="plain")


def test_a_forward_that_reaches_the_original_is_refused() -> None:
    model = Plain().eval()
    original = model.forward
    model.forward = lambda x: 2 * original(x)  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(CaptureError, match=r"Plain\.forward was replaced on the instance by"):
        compiled(model, X, "modules")
