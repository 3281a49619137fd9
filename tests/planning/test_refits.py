"""Whether coefficients are fitted again, and what is left to measurement."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.factors import factored
from fxshare.factors.group import GroupFactors, refitted
from fxshare.planning.judge import Judge, Lost
from fxshare.plans.outlook import TrialResult
from tests.planning.models import FEW, PLAIN, batches, compiled, features, llama, plain_model


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
    measure = Judge.first

    def counted(judge: Judge, *given: Any) -> Lost:
        measured.append(measure(judge, *given))
        return measured[-1]

    monkeypatch.setattr(Judge, "first", counted)
    planner = {"remeasure": 0}
    gm = compiled(plain_model(), PLAIN, {"params_kept": 0.6}, planner, calibration=features())
    assert all(len(group.slices) == 1 for group in gm.fxshare.plan.groups)
    plans = {(trial.cost, trial.measured) for trial in gm.fxshare.plan.outlook.trials}
    assert len(measured) == len(plans)


def test_a_refit_is_decided_for_the_better_half_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first share, and what wins there is what is measured on the rest."""
    refits = []

    def counted(factors: GroupFactors, **keys: Any) -> GroupFactors:
        refits.append((factors.group.slices, factors.group.rank))
        return refitted(factors, **keys)

    monkeypatch.setattr(factored, "refitted", counted)
    # ties make groups of several inputs of every plan
    names = [f"layers.{layer}.q_proj" for layer in range(2)]
    planner = {"remeasure": 0, "tie": [names]}
    gm = compiled(llama(), FEW, {"params_kept": 0.6}, planner, calibration=batches(6))
    plans = {(t.cost, t.predicted) for t in gm.fxshare.plan.outlook.trials}
    kept = {(t.cost, t.predicted): t.groups for t in whole(gm)}
    assert 1 < len(kept) < len(plans)
    assert 0 < len(set(refits)) <= sum(kept.values()) < sum(t.groups for t in plans_of(gm))


def plans_of(gm: Any) -> list[TrialResult]:
    trials = gm.fxshare.plan.outlook.trials
    return list({(t.cost, t.predicted): t for t in trials}.values())


def whole(gm: Any) -> list[TrialResult]:
    outlook = gm.fxshare.plan.outlook
    return [t for t in outlook.trials if t.tokens == outlook.held_back_tokens]
