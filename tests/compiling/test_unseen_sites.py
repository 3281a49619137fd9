"""Linears that a pattern matches and no call shows: left alone with a reason, whoever asks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import FxShareWarning

WIDTH = 8
TYPES = {"a": {"pattern": r"layers\.\d+\.a$"}, "odd": {"pattern": r"layers\.\d+\.odd$"}}
CONFIG = {"weight_types": TYPES, "block_pattern": r"layers\.(\d+)"}
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "sharing": {"group_size": 2, "compression_rate": 0.5},
    "budget": {"budget": {"params_kept": 0.9}, "planner": {"search": "off"}},
}


class Layer(nn.Module):
    """One linear that is what it seems, and one that ``how`` uses."""

    def __init__(self, how: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.odd = nn.Linear(WIDTH, WIDTH)
        self.constant = nn.Parameter(torch.randn(3, WIDTH))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x + self.how(self, self.a(x).tanh())


class Model(nn.Module):
    def __init__(self, how: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _dropped(layer: Layer, x: Tensor) -> Tensor:
    layer.odd(x)
    return x


def _computed_and_dropped(layer: Layer, x: Tensor) -> Tensor:
    y = layer.odd(x).relu()
    torch.stack([y, y + 1]).sum()
    return x


def _written_and_dropped(layer: Layer, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., :4].add_(layer.odd(x)[..., :4])
    return x


def _for_its_shape(layer: Layer, x: Tensor) -> Tensor:
    return x + torch.ones_like(layer.odd(x))


def _in_training(layer: Layer, x: Tensor) -> Tensor:
    return layer.odd(x) if layer.training else x


def _in_another_branch(layer: Layer, x: Tensor) -> Tensor:
    return layer.odd(x) if x.shape[-1] > WIDTH else x


def _by_its_weight(layer: Layer, x: Tensor) -> Tensor:
    return (layer.odd.weight @ x.transpose(1, 2)).transpose(1, 2)


def _beside_its_weight(layer: Layer, x: Tensor) -> Tensor:
    return layer.odd(x) + x * layer.odd.weight.sum()


def _by_hand(layer: Layer, x: Tensor) -> Tensor:
    return x @ layer.odd.weight.T


def _by_hand_and_called(layer: Layer, x: Tensor) -> Tensor:
    return layer.odd(x @ layer.odd.weight.T)


def _the_other_way_round(layer: Layer, x: Tensor) -> Tensor:
    return x @ layer.odd.weight


def _twice(layer: Layer, x: Tensor) -> Tensor:
    return layer.odd(layer.odd(x).tanh())


def _once_of_two(layer: Layer, x: Tensor) -> Tensor:
    layer.odd(x + 1)
    return layer.odd(x)


def _of_a_constant(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.odd(layer.constant).sum(0)


def _through_a_write(layer: Layer, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.add_(layer.odd(x))
    return x + y


UNUSED = "nothing depends on its result"
BESIDE = r"reads its weight itself,? beside"
# how the second linear is used, and why it is no site; None where it is one
HOW = {
    "dropped": (_dropped, UNUSED),
    "computed and dropped": (_computed_and_dropped, UNUSED),
    "written and dropped": (_written_and_dropped, UNUSED),
    "for its shape": (_for_its_shape, UNUSED),
    "in training": (_in_training, "is not called by"),
    "in another branch": (_in_another_branch, "is not called by"),
    "by its weight": (_by_its_weight, "reads its weight itself"),
    "beside its weight": (_beside_its_weight, BESIDE),
    "by hand and called": (_by_hand_and_called, r"without in another|" + BESIDE),
    "the other way round": (_the_other_way_round, "the other way round|reads its weight itself"),
    "twice": (_twice, None),
    "once of two": (_once_of_two, None),
    "of a constant": (_of_a_constant, None),
    "through a write": (_through_a_write, None),
}


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, WIDTH, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("capture", ["fx", "export"])
def test_a_weight_that_is_multiplied_by_without_its_bias_is_a_site_without(capture: Any) -> None:
    model = Model(_by_hand).eval()
    gm = fxshare.compile(model, CONFIG, calibration=_data(), capture=capture)
    bias = {site.name.rpartition(".")[2]: site.bias for site in gm.fxshare.plan.sites}
    assert bias == {"a": True, "odd": False}
    x = _data()[0]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


QUICK = {("fx", "sharing"), ("export", "exact"), ("modules", "budget")}
# which sites there are does not depend on what is made of them; the rest is slow
COMBINED = [
    pytest.param(capture, mode, marks=() if quick else pytest.mark.slow)
    for capture in ("fx", "export", "modules")
    for mode in MODES
    for quick in [(capture, mode) in QUICK]
]


@pytest.mark.parametrize(("capture", "mode"), COMBINED)
@pytest.mark.parametrize("name", HOW)
def test_what_no_call_shows_is_left_with_a_reason(name: str, capture: Any, mode: str) -> None:
    how, reason = HOW[name]
    model = Model(how).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        gm = fxshare.compile(model, [CONFIG, MODES[mode]], calibration=_data(), capture=capture)
    assert gm.fxshare.report.front_end == capture
    sites = {site.name for site in gm.fxshare.plan.sites}
    expected = {f"layers.{n}.{which}" for n in range(2) for which in ("a", "odd")}
    left = {s.name: s.reason for s in gm.fxshare.plan.skipped}
    assert sites | set(left) == expected
    assert bool(left) == (reason is not None)
    for said in left.values():
        assert reason is not None
        assert re.search(reason, said), said
    if mode == "exact":
        x = _data()[0]
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)
