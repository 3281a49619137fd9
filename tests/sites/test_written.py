"""A model that writes to a matched weight in ``forward`` is refused, and its weights stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.errors import CaptureError, MatchError

_FC = {"weight_types": {"fc": {"pattern": r"h\.\d+\.fc"}}}


class _Block(nn.Module):
    def __init__(self, write: Callable[[nn.Linear], None], when: tuple[bool, ...]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.write, self.when = write, when

    def forward(self, x: Tensor) -> Tensor:
        if self.training in self.when:
            self.write(self.fc)
        return x + self.out(torch.relu(self.fc(x)))


class _Model(nn.Module):
    def __init__(self, write: Callable[[nn.Linear], None], when: tuple[bool, ...]) -> None:
        super().__init__()
        self.h = nn.ModuleList(_Block(write, when) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


def _exchange(linear: nn.Linear) -> None:
    linear.weight.data = torch.ones(8, 8)


def _constrain(linear: nn.Linear) -> None:
    linear.weight.data = torch.renorm(linear.weight.data, p=2, dim=0, maxnorm=0.1)


def _clamp(linear: nn.Linear) -> None:
    linear.weight.data.clamp_(-0.01, 0.01)


def _decay(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(0.9)


def _set_bias(linear: nn.Linear) -> None:
    linear.bias.data = torch.ones(8)


def _replace(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * 0.9)


def _part(linear: nn.Linear) -> None:
    linear.weight.data[2:].zero_()


_WRITES = [_clamp, _constrain, _decay, _exchange, _part, _replace, _set_bias]


@pytest.mark.parametrize("when", [(True, False), (True,)], ids=["always", "training"])
@pytest.mark.parametrize("write", _WRITES, ids=lambda write: write.__name__[1:])
def test_a_weight_that_forward_writes_to_is_no_site(write: Any, when: tuple[bool, ...]) -> None:
    model = _Model(write, when)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MatchError, match=r"'h\.0\.fc' the model's forward writes to its weight"):
        fxshare.compile(model, _FC, example=torch.randn(2, 3, 8), capture="modules")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class _Tokens(_Model):
    def __init__(self, write: Callable[[nn.Linear], None], when: tuple[bool, ...]) -> None:
        super().__init__(write, when)
        self.embed = nn.Embedding(20, 8)
        self.beside = nn.Linear(8, 8)  # made-up tokens do not reach it

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(ids)
        return super().forward(x if image is None else x + self.beside(image))


@pytest.mark.parametrize("when", [(True, False), (True,)], ids=["always", "training"])
@pytest.mark.parametrize("write", _WRITES, ids=lambda write: write.__name__[1:])
def test_made_up_tokens_show_it_where_there_is_no_data(write: Any, when: tuple[bool, ...]) -> None:
    model = _Tokens(write, when)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = {"weight_types": {"all": {"pattern": r"(h\.\d+\.(fc|out)|beside)$"}}}
    gm = fxshare.compile(model, config, capture="modules")
    assert {site.name for site in gm.fxshare.plan.sites} == {"h.0.out", "h.1.out", "beside"}
    assert {one.name for one in gm.fxshare.plan.skipped} == {"h.0.fc", "h.1.fc"}
    assert all("writes to its weight" in one.reason for one in gm.fxshare.plan.skipped)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_others_are_sites_beside_it() -> None:
    model = _Model(_exchange, (True, False))
    model.h[1].get_submodule("").when = ()  # type: ignore[union-attr]
    gm = fxshare.compile(model, _FC, example=torch.randn(2, 3, 8), capture="modules")
    assert [site.name for site in gm.fxshare.plan.sites] == ["h.1.fc"]
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("write", [_exchange, _constrain, _set_bias])
def test_a_graph_of_it_is_refused_and_what_was_exchanged_put_back(write: Any) -> None:
    model = _Model(write, (True, False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match=r"writes to 'h\.0\.fc\.(weight|bias)'.*outside of"):
        fxshare.compile(model, _FC, example=torch.randn(2, 3, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
