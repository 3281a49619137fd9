"""What is left of an MLP whose hidden units went is trained like the factors of bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxshare
from fxshare.refining.parameters import trainable_of
from fxshare.result.products import slices_of
from tests.planning.models import batches, compiled, llama, types

ALL = types("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("objective", ["kl", "hidden", "blocks"])
@pytest.mark.parametrize("kinds", [["basis", "units"], ["units"]])
def test_refining_trains_it_and_verify_holds_the_result_to_it(
    objective: Any, kinds: list[str]
) -> None:
    model = llama()
    planner = {"search": "off", "strategy": "separate", "kinds": kinds}
    gm = compiled(model, ALL, {"params_kept": 0.75}, planner)
    units = trainable_of(gm, model, ()).units
    assert units
    after = fxshare.refine(gm, model, batches(8), steps=6, objective=objective, learning_rate=1e-3)
    assert fxshare.verify(model, after).ok
    before = dict(gm.named_parameters())
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before[n])]
    if objective == "kl":
        assert moved
    if moved:  # the first state is kept where no step was better
        assert set(units) & set(moved)
        rows = {row.name: row.refined for row in after.fxshare.report.groups}
        assert all(rows[one.name] for one in after.fxshare.plan.units)
    assert slices_of(after) == slices_of(gm)
