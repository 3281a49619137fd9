"""The checks of the notebook that this project grew out of, against ``fxshare.compile``.

Each is held to the notebook's own tolerance and to the much narrower one that rounding explains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst

CONFIGS = Path(__file__).parents[2] / "configs"


def assert_equal(expected: Tensor, found: Tensor, depth: int) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    distance = worst(expected, found)
    assert distance.relative <= tolerance(torch.float32, depth), str(distance)


class OneLinear(nn.Module):
    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(768, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@torch.no_grad()
def check_linear(out_features: int, slices: int, **keys: Any) -> None:
    torch.manual_seed(0)
    model, x = OneLinear(out_features), torch.randn(4, 16, 768)
    gm = fxshare.compile(model, {"weight_types": {"w": {"pattern": "c_attn$", **keys}}}, example=x)
    assert gm.fxshare.report.mode == "exact"
    (site,) = gm.fxshare.plan.sites
    assert len(site.slices) == slices
    linears = [m for m in gm.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linears] == [out_features // slices] * slices
    assert_equal(model(x), gm(x), depth=1)


def test_linear_768_to_3072() -> None:
    check_linear(3072, 1)


def test_linear_768_to_2304_in_3() -> None:
    check_linear(2304, 3, split="qkv")


def test_linear_768_to_2304_in_36() -> None:
    check_linear(2304, 36, split="heads", qkv_order="qkv", n_head=12)


@torch.no_grad()
def test_gpt2_of_full_depth() -> None:
    """All layers and heads of GPT-2 small; each head an eighth as wide, for time."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=96, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 128, (2, 9))
    gm = fxshare.compile(model, CONFIGS / "gpt2.yaml", example=ids)
    sites = gm.fxshare.plan.sites
    assert len(sites) == 12 * 4
    assert sum(len(site.slices) for site in sites) == 12 * (36 + 3)
    assert gm.fxshare.report.params_kept == 1.0
    assert_equal(model(ids).logits, gm(ids).logits, depth=2 * len(sites) + 1)
