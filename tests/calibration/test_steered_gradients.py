"""A budget's gradients are those of the original's autograd, whatever steers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxshare
import tests.capture.steered_models as models
from fxshare.base.numerics import worst
from fxshare.calibration.calibrate import calibrate
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import CalibrationError
from fxshare.sites.match import match
from tests.capture.steered_models import CONFIG, Round, Stack, x_of
from tests.strategies import no_warnings_of_ours


class Steered(models.First):
    """A straight-through estimator, a region without gradients, and a reversed gradient."""

    def around(self, at: int, x: Tensor) -> Tensor:
        y: Tensor = super(models.First, self).around(at, x)
        if at == 0:
            return Round.apply(y, 2)  # type: ignore[no-any-return, no-untyped-call]
        if at == 1:
            with torch.no_grad():
                again = super(models.First, self).around(at, y)
            return y + again
        return models.Reverse.apply(y, 0.5)  # type: ignore[no-any-return, no-untyped-call]


def energy(output: Any, batch: Any) -> Tensor:
    loss: Tensor = output.square().sum()
    return loss


def by_hand(model: Stack, x: Tensor) -> dict[str, Tensor]:
    """``E[δ δᵀ]`` at the outputs of linears, from hooks on the original; a linear that is called
    twice has the gradients of both."""
    rows: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> None:
            calls[name] = calls.get(name, 0) + y[..., 0].numel()
            if y.requires_grad:
                y.register_hook(lambda g: rows.setdefault(name, []).append(g.flatten(0, -2)))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, torch.nn.Linear)
    ]
    energy(model(x), None).backward()
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat(found).T.double() @ torch.cat(found).double() / calls[name]
        for name, found in rows.items()
    }


@pytest.mark.parametrize("mode", ["fx", "modules"])
@pytest.mark.parametrize("kind", [Steered, models.StraightThrough], ids=lambda k: k.__name__)
def test_moments_are_those_of_the_originals_autograd(kind: type[Stack], mode: Any) -> None:
    model = kind().eval().double()
    x = x_of().double()
    captured = capture(model, x, mode=mode)
    sites = match(model, load_config(CONFIG)).sites
    with no_warnings_of_ours():
        found = calibrate(captured, [x], sites, gradients=True, loss=energy)
    expected = by_hand(model, x)
    assert expected.keys() == {site.name for site in sites}
    for name, moment in expected.items():
        assert worst(moment, found.moment(name, name)).relative <= 1e-12, name


def test_a_site_without_gradients_is_named_with_the_way_out() -> None:
    model = models.NoGrad().eval()
    captured = capture(model, x_of(), mode="fx")
    sites = match(model, load_config(CONFIG)).sites
    with no_warnings_of_ours():
        found = calibrate(captured, [x_of()], sites, gradients=True, loss=energy)
    assert found.moment("layers.1.0", "layers.1.0").shape == (12, 12)
    way_out = r"'layers\.0\.0' gets no gradient: .*no_grad; leave it out of the patterns"
    with pytest.raises(CalibrationError, match=way_out):
        found.moment("layers.0.0", "layers.0.0")
    # and that is one
    types = {name: {"pattern": rf"layers\.[12]\.{at}$"} for name, at in (("a", 0), ("b", 2))}
    cfg = {"weight_types": types, "budget": {"params_kept": 0.8}, "planner": {"search": "off"}}
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=[x_of(at) for at in range(4)], copy=True)
    assert not gm.fxshare.plan.skipped
