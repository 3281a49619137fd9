"""One model under several budgets, on one set of statistics."""

from __future__ import annotations

from typing import Any

import pytest

import fxshare
from fxshare.compiling.several import Several
from fxshare.errors import PlanError
from fxshare.planning import gathered
from tests.planning.models import batches, llama, types
from tests.strategies import no_warnings_of_ours

ALL = types("q", "k", "v", "o", "gate", "up", "down")


def what(gm: Any) -> object:
    """What a plan chose, and what it is predicted to lose beside the slope, which is not measured
    for several."""
    plan = gm.fxshare.plan
    groups = [(group.slices, group.rank, group.storage, group.bits) for group in plan.groups]
    units = [(entry.name, entry.kept, entry.bits) for entry in plan.units]
    outlook = plan.outlook
    return groups, units, plan.rounded, outlook.trial, outlook.predicted - outlook.slope


def test_each_is_what_compile_makes_and_data_is_gone_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, search = llama(), {"search": "kinds", "remeasure": 0}
    passes = list[int]()
    calibrate = gathered.calibrate
    monkeypatch.setattr(
        gathered, "calibrate", lambda *a, **k: passes.append(1) or calibrate(*a, **k)
    )
    with no_warnings_of_ours():
        several = Several.of(model, ALL, batches(), search="kinds")
        assert len(passes) == 1
        for share, kinds in ((0.7, ["basis", "units"]), (0.5, ["basis"])):
            budget, planner = {"params_kept": share}, {"kinds": kinds}
            own = several.compiled(budget, planner)
            assert len(passes) == 1
            cfg = [ALL, {"budget": budget, "planner": planner | search}]
            alone = fxshare.compile(model, cfg, calibration=batches())
            passes.pop()
            first, second = what(own), what(alone)
            assert first[:4] == second[:4]
            assert first[4] == pytest.approx(second[4], rel=1e-9)
        with pytest.raises(PlanError, match="below the cheapest plan"):
            several.compiled({"params_kept": 0.3}, {"kinds": ["units"]})
