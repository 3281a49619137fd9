"""Near dense, what groups lose is less than float32 tells of a spectrum."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from fxshare.compiling.replan import replan
from fxshare.factors.decompose import rounding
from fxshare.factors.tails import tails_of, unsure_by
from fxshare.planning.search import Search

WIDTH = 24
SAID = "priced in float64"


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Features of which each is much smaller than the one before, as behind a trained model."""
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** (-torch.arange(WIDTH) / 2)
    return [(torch.randn(200, WIDTH, generator=generator) * scale).to(dtype) for _ in range(3)]


def config(kept: float) -> dict[str, Any]:
    return {
        "weight_types": {"all": {"pattern": r"\d+$"}},
        "budget": {"params_kept": kept},
        "planner": {"search": "off", "strategy": "separate", "storage": "plain"},
    }


def plan(kept: float, dtype: torch.dtype = torch.float32, **given: Any) -> Plan:
    return fxshare.plan(model(dtype), config(kept), calibration=batches(dtype), **given)


def ranks(found: Plan) -> dict[str, int]:
    return {group.slices[0]: group.rank for group in found.groups}


@pytest.mark.parametrize(
    ("kept", "dtype", "said"),
    [(0.7, torch.float32, True), (0.15, torch.float32, False), (0.7, torch.float64, False)],
)
def test_it_is_said_where_float32_does_not_tell(
    kept: float, dtype: torch.dtype, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fxshare"):
        plan(kept, dtype)
    assert (SAID in caplog.text) == said


def test_ranks_that_lose_differently_do_not_have_one_price(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, double = plan(0.7).outlook, plan(0.7, torch.float64).outlook
    spent = sum(ranks(plan(0.7)).values())
    monkeypatch.setattr(Search, "tells", lambda *_: True)
    single = plan(0.7)
    assert found is not None
    assert double is not None
    assert single.outlook is not None
    # the moments of a float32 model are its own
    assert found.predicted == pytest.approx(double.predicted, rel=0.5)
    assert found.predicted > 0
    assert single.outlook.predicted == 0
    # what was free to give up was given up, though there was budget for it
    assert sum(ranks(single).values()) < spent


def test_another_budget_is_planned_from_what_was_priced_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan(0.7, work=tmp_path)
    assert ranks(replan(tmp_path).plan) == ranks(found)
    monkeypatch.setattr("fxshare.planning.stored_problem.priced_exactly", lambda _: False)
    assert ranks(replan(tmp_path).plan) != ranks(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_unsure_by_what_they_are_zero_below(dtype: torch.dtype) -> None:
    values = 10.0 ** -torch.arange(12.0).double()
    found = unsure_by(tails_of(values, 12), dtype)
    assert found == pytest.approx(0.5 * rounding(values, dtype), rel=1e-9)
    tails = tails_of(values, 12, dtype=dtype)
    whole = tails_of(values, 12)
    assert ((tails == 0) == (whole < found)).all()
