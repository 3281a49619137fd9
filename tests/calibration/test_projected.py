"""Moments of many outputs, kept in the width of the inputs, against the moments themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxshare.base.numerics import worst
from fxshare.calibration import gradients
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.statistics import Statistics
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import CalibrationError
from fxshare.factors.group import factorise_group
from fxshare.factors.metric import slice_statistics
from fxshare.factors.spectra import Spectra
from fxshare.plans.plan import Group
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights, substituted
from tests.planning.models import PLAIN, plain_model

CFG = load_config(PLAIN)


def measured(model: nn.Module, mode: Any, moved: float = 0.0) -> tuple[Statistics, Any, Any]:
    """Statistics of a model with weights so far from those that are priced; these and the sites."""
    sites = match(model, CFG).sites
    torch.manual_seed(5)
    data = [torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(6)]
    captured = capture(model, data[0], mode=mode)
    weights = dense_weights(model, sites)
    other = {name: w + moved * torch.randn(w.shape).double() for name, w in weights.items()}
    on = substituted(captured, sites, other, {})
    return calibrate(on, data, sites, gradients=True, weights=weights), weights, sites


def plain() -> nn.Module:
    torch.manual_seed(3)
    return plain_model().double()


@pytest.mark.parametrize("mode", ["fx", "modules"])
@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_equals_the_whole_moment(mode: str, moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, weights, sites = measured(plain(), mode, moved)
    monkeypatch.setattr(gradients, "PROJECTED_ABOVE", 1)
    projected, _, _ = measured(plain(), mode, moved)
    wide = [s.name for x in sites for s in x.slices if s.out_features > x.in_features]
    assert wide
    assert [n for n in whole.gradients if projected.is_projected(n)] == wide
    for name in wide:
        moment: Tensor = whole.moment(name, name)
        weight_OI = weights[name]
        expected = weight_OI.T @ moment @ weight_OI
        assert worst(expected, projected.moment(name, name)).relative <= 1e-12
        assert projected.trace(name, name) == pytest.approx(float(moment.trace()), rel=1e-12)
    assert projected.bytes < whole.bytes


def test_planning_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    both = []
    for above in (1 << 20, 1):
        monkeypatch.setattr(gradients, "PROJECTED_ABOVE", above)
        found, weights, sites = measured(plain(), "fx")
        both.append(Spectra(slice_statistics(sites, weights, found)))
    whole, projected = both
    (name,) = [n for n, one in projected.slices.items() if one.is_projected]
    part = frozenset({name})
    torch.testing.assert_close(
        torch.from_numpy(projected.tails(part)),
        torch.from_numpy(whole.tails(part)),
        rtol=1e-9,
        atol=0,
    )
    out, features = whole.slices[name].weight_OI.shape
    group = Group(
        name="g",
        type="t",
        label="",
        layers=(),
        slices=(name,),
        in_features=features,
        out_features=out,
        rank=3,
    )
    made = [factorise_group(group, one) for one in both]
    assert worst(made[0].product(name), made[1].product(name)).relative <= 1e-9
    # also of factors that another metric made, which are no optimum of this one
    by_error = Spectra({n: one.unweighted() for n, one in projected.slices.items()})
    other = factorise_group(group, by_error).product(name)
    losses = [one.slices[name].quadratic_loss(other) for one in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0] > made[0].lost


def test_dead_weights_have_a_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # W of less than full rank has no unique X with W X = W − Ŵ; any will do
    monkeypatch.setattr(gradients, "PROJECTED_ABOVE", 1)
    model = plain()
    up = model.get_submodule("up")
    assert isinstance(up, nn.Linear)
    with torch.no_grad():
        up.weight[:, 0] = up.weight[:, 1]
    found, weights, sites = measured(model, "fx")
    one = slice_statistics(sites, weights, found)["up"]
    monkeypatch.setattr(gradients, "PROJECTED_ABOVE", 1 << 20)
    full, _, _ = measured(model, "fx")
    whole = slice_statistics(sites, weights, full)["up"]
    mixed = one.weight_OI.double() @ torch.randn(8, 8, dtype=torch.float64)
    assert one.quadratic_loss(mixed) == pytest.approx(whole.quadratic_loss(mixed), rel=1e-8)


def test_no_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "PROJECTED_ABOVE", 1)
    model = plain()
    sites = match(model, CFG).sites
    data = [torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(2)]
    captured = capture(model, data[0], mode="fx")

    def zero(output: Tensor, batch: object) -> Tensor:
        return (output * 0).sum()

    found = calibrate(captured, data, sites, gradients=True, loss=zero)
    with pytest.raises(CalibrationError, match="'up' gets no gradient: it is zero at every token"):
        slice_statistics(sites, dense_weights(model, sites), found)
