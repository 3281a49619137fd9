"""Whether coefficients are fitted again, and what is left to measurement."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.planning.judge import Judge
from tests.planning.models import PLAIN, compiled, features, plain_model


@pytest.mark.parametrize("refit", [False, True])
def test_a_refit_that_was_decided_on_is_kept_to(refit: bool) -> None:
    planner = {"search": "off", "refit": refit}
    gm = compiled(plain_model(), PLAIN, {"params_kept": 0.6}, planner, calibration=features())
    assert gm.fxshare.plan.groups
    assert gm.fxshare.plan.outlook.refit is refit


def test_with_one_input_there_is_nothing_to_measure_a_refit_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []
    measure = Judge.__call__

    def counted(judge: Judge, *given: Any) -> float:
        measured.append(measure(judge, *given))
        return measured[-1]

    monkeypatch.setattr(Judge, "__call__", counted)
    planner = {"remeasure": 0}
    gm = compiled(plain_model(), PLAIN, {"params_kept": 0.6}, planner, calibration=features())
    assert all(len(group.slices) == 1 for group in gm.fxshare.plan.groups)
    plans = {trial.measured for trial in gm.fxshare.plan.outlook.trials}
    assert len(plans) <= len(measured) < 2 * len(plans)
