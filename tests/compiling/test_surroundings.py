"""Compiling inside of the caller's modes: they are left, or the error names them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxshare
from fxshare.errors import CalibrationError, CaptureError, FactoriseError, MatchError
from tests.toys import Residual

_FC = {"weight_types": {"fc": {"pattern": r"h\.\d+\.fc"}}, "block_pattern": r"h\.(\d+)"}
_SHARING = {**_FC, "group_size": 2, "compression_rate": 0.5}
_BUDGET = {**_FC, "budget": {"params_kept": 0.8}}


def _made() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def _data(device: str = "cpu") -> list[Tensor]:
    return [torch.randn(4, 5, 16, device=device) for _ in range(3)]


_AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu"),
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("cfg", [_SHARING, _BUDGET], ids=["sharing", "budget"])
@pytest.mark.parametrize("around", list(_AROUND))
def test_modes_around_compile_are_left(around: str, cfg: dict[str, Any], capture: Any) -> None:
    model, data = _made(), _data()
    expected = fxshare.compile(model, cfg, calibration=data, capture=capture)
    with _AROUND[around]():
        found = fxshare.compile(model, cfg, calibration=data, capture=capture)
    assert found.fxshare.plan.groups == expected.fxshare.plan.groups
    torch.testing.assert_close(found(data[0]), expected(data[0]), rtol=0, atol=0)
    assert all(p.requires_grad and not p.is_inference() for p in found.parameters())


@pytest.mark.parametrize("capture", ["fx", "export", "modules"])
def test_a_budget_takes_what_was_made_in_inference_mode(capture: Any) -> None:
    expected = fxshare.compile(_made(), _BUDGET, calibration=_data(), capture=capture)
    with torch.inference_mode():
        model, data = _made(), _data()
        found = fxshare.compile(model, _BUDGET, calibration=iter(data), capture=capture)
    assert found.fxshare.plan.groups == expected.fxshare.plan.groups
    assert all(p.is_inference() for p in model.parameters())
    assert not any(p.is_inference() for p in found.parameters())


def test_batches_in_containers_are_copied_out_of_inference_mode() -> None:
    with torch.inference_mode():
        data = [{"x": x} for x in _data()]
    fxshare.compile(_made(), _BUDGET, calibration=data)
    assert all(batch["x"].is_inference() for batch in data)


@pytest.mark.parametrize("cfg", [_SHARING, _BUDGET], ids=["sharing", "budget"])
def test_a_model_without_values_is_refused_where_they_are_needed(cfg: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = _made()
    for data in (None, _data("meta")):
        with pytest.raises(FactoriseError, match=r"'h\.0\.fc' is on the meta device.*from_pretr"):
            fxshare.compile(model, cfg, calibration=data)
    fxshare.compile(model, _FC, calibration=_data("meta"))
    with FakeTensorMode():
        model = _made()
    with pytest.raises(MatchError, match=r"'h\.0\.fc' .*FakeTensor.*outside of FakeTensorMode"):
        fxshare.compile(model, cfg, calibration=_data())


def test_data_without_values_is_refused() -> None:
    with FakeTensorMode():
        data = _data()
    with pytest.raises(CalibrationError, match=r"holds a FakeTensor.*outside of FakeTensorMode"):
        fxshare.compile(_made(), _SHARING, calibration=data)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_are_refused_by_name(transform: Any) -> None:
    model = _made()

    def compiling(x: Tensor) -> Tensor:
        fxshare.compile(model, _FC, calibration=[x])
        return x.sum()

    reason = rf"torch\.func \({transform.__name__}\).*call it before"
    with pytest.raises(CaptureError, match=reason):
        transform(compiling)(torch.randn(3, 4, 16))


def test_verify_and_lower_leave_autocast() -> None:
    model, data = _made(), _data()
    gm = fxshare.compile(model, _SHARING, calibration=data)
    with torch.autocast("cpu"):
        assert fxshare.verify(model, gm).ok
        fxshare.lower(gm)


@pytest.mark.parametrize("empty", [torch.zeros(0, 5, 16), torch.zeros(4, 0, 16)])
@pytest.mark.parametrize("place", [0, 1])
def test_a_batch_that_holds_nothing_is_refused(empty: Tensor, place: int) -> None:
    data = _data()
    data.insert(place, empty)
    with pytest.raises(CalibrationError, match=r"a batch holds nothing: .*leave it out"):
        fxshare.compile(_made(), _BUDGET, calibration=data)
