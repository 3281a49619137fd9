"""At module granularity a weight of no linear module stays dense, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.errors import MatchError

WIDTH, EXPERTS, TOKENS = 12, 3, 5


class Experts(nn.Module):
    """transformers' stacked experts, each read through ``F.linear`` and weighed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / 4)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        up = torch.einsum("btd,ehd->bteh", x, self.up_proj)
        return torch.einsum("bteh,edh,bte->btd", up.relu(), self.down_proj, shares)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()
        self.mixing = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mixing(self.experts(x, self.router(x).softmax(-1)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


CONFIG: dict[str, Any] = {
    "weight_types": {
        "mixing": {"pattern": r".*\.mixing$"},
        "in_proj": {"pattern": r".*\.in_proj_weight$", "split": "qkv"},
        "up": {"pattern": r".*\.experts\.up_proj$"},
        "down": {"pattern": r".*\.experts\.down_proj$"},
    },
    "block_pattern": r"layers\.(\d+)",
    "group_size": 2,
    "compression_rate": 0.6,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval()


X = torch.linspace(-1, 1, 2 * TOKENS * WIDTH).reshape(2, TOKENS, WIDTH)


def test_what_stays_dense_is_said_with_the_way_out(model: nn.Module) -> None:
    gm = fxshare.compile(model, CONFIG, example=X, capture="modules")
    report = gm.fxshare.report
    assert {site.type for site in gm.fxshare.plan.sites} == {"mixing"}
    skipped = {s.type: s for s in report.skipped}
    assert set(skipped) == {"in_proj", "up", "down"}
    assert len(report.skipped) == 2 * (1 + 2 * EXPERTS)
    for s in report.skipped:
        for part in ("capture: modules", "stays dense", "example=", "capture: auto or fx"):
            assert part in s.reason
    text = str(report)
    warning, *rest = text.splitlines()
    assert warning.startswith("warning: 94% of the weights that could be rewritten stay dense")
    lines = [line for line in rest if "stays dense" in line]
    assert len(lines) == 4  # two of a kind are listed, and many are one line
    assert any("layers.0.attention.in_proj_weight (in_proj)" in line for line in lines)
    assert any("layers.1.experts.up_proj.2 (6 in all) (up)" in line for line in lines)


def test_the_way_out_works(model: nn.Module) -> None:
    cfg = {**CONFIG, "weight_types": {k: CONFIG["weight_types"][k] for k in ("mixing", "in_proj")}}
    gm = fxshare.compile(model, cfg, example=X, capture="auto")
    assert gm.fxshare.front_end == "fx"
    assert {site.type for site in gm.fxshare.plan.sites} == {"mixing", "in_proj"}
    assert not gm.fxshare.report.skipped


@pytest.mark.parametrize("example", [X, None])  # asked for, and what is left without an example
def test_nothing_but_parameters_is_an_error_that_says_why(
    model: nn.Module, example: Tensor | None
) -> None:
    cfg = {**CONFIG, "weight_types": {"up": CONFIG["weight_types"]["up"]}}
    with pytest.raises(MatchError) as caught:
        fxshare.compile(
            model, cfg, example=example, capture="modules" if example is not None else None
        )
    assert "'layers.0.experts.up_proj.0' is a parameter" in str(caught.value)
    assert "give an example of the inputs" in str(caught.value)


class _Tied(nn.Module):
    """Two layers of their own modules whose fused projections are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.layers[2].weight, self.layers[2].bias = self.layers[0].weight, self.layers[0].bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).chunk(3, -1)
            x = x + q * k.sigmoid() - v
        return x


@pytest.mark.parametrize("mode", ["exact", "sharing"])
def test_slices_of_a_tied_weight_are_apart_in_each_of_its_modules(
    mode: str, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Tied().eval()
    config: dict[str, Any] = {
        "weight_types": {"a": {"pattern": r"layers\.\d$", "split": "qkv", "n_head": 2}}
    }
    if mode == "sharing":
        config |= {"group_size": 1, "compression_rate": 0.7, "block_pattern": r"layers\.(\d+)"}
    data = [torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))]
    gm = fxshare.compile(model, config, calibration=data, capture="modules")
    x = data[0][:2]
    expected = fxshare.compile(model, config, calibration=data, capture="fx")(x)
    torch.testing.assert_close(gm(x), expected)
    torch.testing.assert_close(fxshare.lower(gm)(x), expected)
    fxshare.save(gm, tmp_path / "out")
    torch.testing.assert_close(fxshare.load(tmp_path / "out", model=_Tied)(x), expected)
    if mode == "exact":
        torch.testing.assert_close(gm(x), model(x))
