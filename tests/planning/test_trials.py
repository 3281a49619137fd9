"""How many plans each effort tries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshare.factors.spectra import Spectra
from fxshare.planning import search
from fxshare.planning.kinds.basis import make_problem
from fxshare.planning.options import Options
from fxshare.planning.solver.solve import solve
from fxshare.planning.trials import Effort, is_outdone, trials
from fxshare.plans.outlook import Outlook
from tests.planning.build import gram, node, slice_of
from tests.planning.models import PLAIN, compiled, features, plain_model


@pytest.mark.parametrize(
    ("effort", "mergeable", "count", "merged"),
    [
        ("off", True, 1, 0),
        ("kinds", True, 1, 0),
        ("quick", False, 6, 0),
        ("quick", True, 7, 1),
        ("thorough", False, 11, 0),
        ("thorough", True, 13, 2),
    ],
)
def test_more_effort_tries_more_and_starts_with_the_plain_optimum(
    effort: Effort, mergeable: bool, count: int, merged: int
) -> None:
    found = trials(effort, mergeable=mergeable)
    assert len({trial.name for trial in found}) == len(found) == count
    assert sum(trial.merge for trial in found) == merged
    first = found[0]
    assert (first.floor, first.blend, first.merge, first.loss_aware) == (0.0, 0.0, False, True)


@pytest.mark.parametrize(
    ("predicted", "is_left_out"), [((0.5, 1.9), False), ((0.5, 2.1), True), ((2.1, 0.5), False)]
)
def test_activation_error_is_left_out_where_it_is_far_worse_by_the_loss(
    predicted: tuple[float, float], is_left_out: bool
) -> None:
    found = {trial.name: trial for trial in trials("quick", mergeable=True)}
    planned, uniform = found["planned"], found["uniform"]
    known = dict(zip((planned, uniform), predicted, strict=True))
    by_error = found["uniform, activation error"]
    assert is_outdone(by_error, known) is is_left_out
    assert not is_outdone(uniform, known)
    # whose own was not tried says nothing of it
    assert not is_outdone(by_error, {planned: 0.5, found["floor 0.6"]: 5.0})


def test_a_search_tries_no_activation_error_where_plans_are_far_better() -> None:
    torch.manual_seed(0)
    model = plain_model()
    with torch.no_grad():  # some weights that are of low rank already, and others that are not
        u, s, v = torch.linalg.svd(model.up.weight)
        model.up.weight.copy_(u[:, :2] * s[:2] @ v[:2])
    names = [t.name for t in outlook_of({"params_kept": 0.8}, 1, model=model).trials]
    assert "uniform" in names
    assert "uniform, activation error" not in names
    assert "same input merged" in names or len(names) >= 10


def outlook_of(budget: dict[str, float], remeasure: int, **keys: Any) -> Outlook:
    data = keys.pop("calibration", features(4, rows=64))
    planner = {"remeasure": remeasure}
    found: Outlook = compiled(
        keys.pop("model", None) or plain_model(), PLAIN, budget, planner, calibration=data, **keys
    ).fxshare.plan.outlook
    return found


def test_the_report_has_every_trial_of_every_round() -> None:
    """Those on statistics measured again too, and what a limit of the loss made of the best."""
    once, twice = (outlook_of({"params_kept": 0.5}, rounds) for rounds in (0, 1))
    names = [trial.name for trial in once.trials]
    assert len(names) > 1
    assert [trial.name for trial in twice.trials] == names + [f"{n}, remeasured" for n in names]
    assert len(outlook_of({"max_loss_increase": 0.1}, 0).trials) > len(names)


def test_floors_price_no_group_that_was_not_priced_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, width = 7, 16
    names = [f"h.{layer}" for layer in range(layers)]
    common = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).double()
    slices = {}
    for at, name in enumerate(names):
        one = slice_of(width, width, at, input=at, gram_II=gram(width, at))
        mixed = one.weight_OI[:, :8] @ common / 20 + one.weight_OI
        slices[name] = replace(one, weight_OI=mixed)
    nodes = {
        name: node(name, layer=at, input=at, in_features=width, out_features=width)
        for at, name in enumerate(names)
    }
    monkeypatch.setattr(search, "nodes_of", lambda sites, slices: nodes)
    options, dense = Options(), layers * width * width
    found = search.Search((), {}, {}, options, 0.6 * dense, judge=None)
    spectra = Spectra(slices)
    solve(found._problem(spectra, options, "grown"), 0.6 * dense, strategy="grown")
    before, floored = spectra.computed, replace(options, floor=0.3)
    problem = found._problem(spectra, floored, "grown")
    assert solve(problem, 0.6 * dense, strategy="grown").priced <= before
    assert spectra.computed == before
    # which the same trial would do by itself
    alone = make_problem(nodes, spectra, floored)
    solve(alone, 0.6 * dense, strategy="grown")
    assert spectra.computed > before


@pytest.mark.parametrize(("count", "first"), [(4, 22), (20, 64), (40, 2 * 64), (70, 3 * 64)])
def test_the_better_half_is_judged_on_everything(count: int, first: int) -> None:
    """The others on the first third of the calls held back, or of the rows of one alone."""
    held = max(count // 10, 1) * 64
    outlook = outlook_of({"params_kept": 0.5}, 0, calibration=features(count, rows=64))
    assert outlook.held_back_tokens == held
    assert {trial.tokens for trial in outlook.trials} == {first, held}
    plans = {(t.cost, t.predicted): t for t in outlook.trials}.values()
    whole = [t for t in plans if t.tokens == held]
    assert len(whole) == -(-len(plans) // 2)
    assert outlook.measured == min(t.measured for t in whole if t.measured is not None)


def test_what_cannot_be_cut_is_judged_whole() -> None:
    """A given loss reads the batch; captures of modules have not seen that rows may be fewer."""

    def energy(output: Tensor, batch: Tensor) -> Tensor:
        assert len(output) == len(batch)
        return output.pow(2).sum()

    for keys in ({"loss": energy}, {"capture": "modules"}):
        outlook = outlook_of({"params_kept": 0.5}, 0, **keys)
        assert {trial.tokens for trial in outlook.trials} == {outlook.held_back_tokens} == {64}
