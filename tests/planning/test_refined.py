"""``search: refined``: plans compared by what they lose after a few steps of training."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import fxshare
from fxshare.compiling import refined as refining
from fxshare.errors import PlanError, RefineError
from fxshare.planning.trials import MOST_REFINED, AfterRefining
from fxshare.views.table import trials_table
from tests.planning.models import (
    MANY,
    PLAIN,
    batches,
    compiled,
    features,
    groups_of,
    llama,
    plain_model,
)
from tests.toys import same_tensors, tensors_of

HALF = {"params_kept": 0.5}
REFINED = {"search": "refined", "remeasure": 0}


class Surroundings(NamedTuple):
    """What a compilation is to leave as it was, before and afterwards."""

    tensors: tuple[Any, Any]
    states: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any, Surroundings]:
    """The model, the compiled one, and what was around it."""
    model = llama()
    before, state = tensors_of(model), torch.get_rng_state()
    found = compiled(model, MANY, HALF, REFINED)
    around = Surroundings((before, tensors_of(model)), (state, torch.get_rng_state()))
    return model, found, around


@pytest.fixture(scope="module")
def found(both: tuple[Any, Any, Surroundings]) -> Any:
    return both[1]


def after(plan: fxshare.Plan) -> dict[str, tuple[float, int]]:
    """What plans lost after refinement, and after how many steps, by trial."""
    assert plan.outlook is not None
    return {t.name: (t.refined, t.refined_steps) for t in plan.outlook.trials if t.refined}


def test_the_better_half_is_refined_further_and_the_best_of_it_kept(found: Any) -> None:
    plan = found.fxshare.plan
    lost = after(plan)
    assert 2 <= len(lost) <= MOST_REFINED
    longer = {name: loss for name, (loss, steps) in lost.items() if steps == 80}
    assert len(longer) == -(-len(lost) // 2)
    assert {steps for _, steps in lost.values()} == {20, 80}
    assert plan.outlook.trial == min(longer, key=longer.__getitem__)
    header, rows = trials_table(plan)
    at = header.index("refined")
    assert sum(row[at] != "–" for row in rows) == len(lost)
    assert all(len(row) == len(header) for row in rows)


def test_the_model_is_as_it_was_and_the_plan_is_within_its_budget(
    both: tuple[Any, Any, Surroundings],
) -> None:
    model, one, around = both
    assert same_tensors(*around.tensors)
    assert torch.equal(*around.states)
    assert one.fxshare.plan.params_kept <= 0.5
    assert one.fxshare.refined == ()  # the plan is chosen by it, the weights are not refined
    assert fxshare.verify(model, one).ok


def test_the_same_again_and_by_plan_alone(found: Any) -> None:
    cfg = {**MANY, "budget": HALF, "planner": REFINED}
    plan = fxshare.plan(llama(), cfg, calibration=batches())
    assert groups_of(plan) == groups_of(found.fxshare.plan)
    assert after(plan) == after(found.fxshare.plan)


def test_the_order_after_refinement_decides_not_the_one_before() -> None:
    def last_is_best(stages: Any, weights: Any, plans: Any, *rest: Any, **keys: Any) -> Any:
        return [AfterRefining(1.0 / (1 + at), 80) for at in range(len(plans))]

    quick = compiled(llama(), MANY, HALF, {"remeasure": 0})
    with mock.patch("fxshare.compiling.budgeted.after_refining", last_is_best):
        other = compiled(llama(), MANY, HALF, REFINED)
    outlook = other.fxshare.plan.outlook
    assert outlook.trial != quick.fxshare.plan.outlook.trial
    assert outlook.measured >= quick.fxshare.plan.outlook.measured


def test_a_model_without_logits_and_one_at_module_granularity() -> None:
    one = compiled(plain_model(), PLAIN, HALF, REFINED, calibration=features(4))
    assert after(one.fxshare.plan)
    cfg = {**MANY, "capture": "modules"}
    assert after(compiled(llama(), cfg, HALF, REFINED).fxshare.plan)


def test_a_loss_of_the_users_own_is_refined_by() -> None:
    seen = []

    def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return output.square().sum()

    cfg = {**PLAIN, "budget": HALF, "planner": REFINED}
    with mock.patch.object(refining, "refine", wraps=refining.refine) as refine:
        fxshare.compile(plain_model(), cfg, calibration=features(4), loss=loss)
    assert refine.call_args.kwargs["loss"] is loss
    assert any(seen)


def test_a_plan_that_cannot_be_refined_is_left_out_and_none_at_all_is_an_error(found: Any) -> None:
    real, seen = refining.refine, []

    def fails_first(gm: Any, *rest: Any, **keys: Any) -> Any:
        seen.append(gm)
        if len(seen) == 1:
            raise RefineError("the loss on batch 0 is not finite")
        return real(gm, *rest, **keys)

    with mock.patch.object(refining, "refine", fails_first):
        other = compiled(llama(), MANY, HALF, REFINED).fxshare.plan
    lost = after(found.fxshare.plan)
    (first,) = lost.keys() - after(other).keys()
    assert after(other).keys() == lost.keys() - {first}
    assert other.outlook.trial in after(other)
    never = mock.patch.object(refining, "refine", side_effect=RefineError("not finite"))
    with never, pytest.raises(PlanError, match=r"no plan can be refined; .*: not finite"):
        compiled(llama(), MANY, HALF, REFINED)


def test_a_limit_of_the_loss_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(PlanError, match=r"compares plans of one size.*params_kept, or search: qu"):
        compiled(llama(), MANY, {"max_loss_increase": 0.1}, REFINED)


def test_the_time_is_in_the_estimate() -> None:
    cfg = [{**MANY, "budget": HALF}, {"planner": REFINED}]
    stages = {
        s.name: s.seconds for s in fxshare.estimate(llama(), cfg, tokens=256, length=8).stages
    }
    assert stages["refine plans"] > 0
