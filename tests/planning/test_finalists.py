"""The best plans of each set of kinds are compared to the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fxshare.planning import search as searching
from fxshare.planning.finalists import Calls, decided, finalists
from fxshare.planning.judge import Lost
from fxshare.planning.trials import Trial, Tried, again, is_far, trials
from tests.planning.models import batches, compiled, llama, types

ALL = types("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass
class One:
    """What a finalist is asked for."""

    trial: Trial
    lost: Lost

    @property
    def measured(self) -> float:
        return self.lost.per_token


class Told:
    """A judge that was told what plans lose on each call."""

    is_distance = False

    def __init__(self, losses: dict[str, Sequence[float]]) -> None:
        self.told, self.asked = losses, list[tuple[str, int]]()

    def losses(self, on: str, which: Sequence[int]) -> list[float]:
        self.asked += [(on, number) for number in which]
        return [self.told[on][number] for number in which]


def plan(name: str, measured: float, *without: str) -> Any:
    return One(Trial(name, without=without), Lost(measured, 1))


def of(held: dict[str, Sequence[float]], fit: dict[str, Sequence[float]]) -> tuple[str, Told]:
    """The plan that is kept of these, given in the order of their kinds, and the judge of more."""
    plans = [plan(name, sum(losses)) for name, losses in held.items()]
    more = Told(fit)

    def calls(judge: Told) -> Any:
        return Calls(judge, [1.0] * len(next(iter(judge.told.values()))))  # type: ignore[arg-type]

    kept = decided(plans, calls(Told(held)), calls(more), lambda one, _: one.trial.name)  # type: ignore[arg-type, return-value]
    return kept.trial.name, more


def test_every_set_of_kinds_is_tried_that_has_one_fewer() -> None:
    found = trials("quick", mergeable=False, kinds=["units", "heads"])
    assert len({trial.name for trial in found}) == len(found)
    first = [t for t in found if t.name.startswith("planned")]
    assert {(t.without, t.insists) for t in first} == {
        ((), False),
        (("units", "heads"), False),
        (("units",), False),
        (("heads",), False),
        ((), True),
        (("units",), True),
        (("heads",), True),
        (("basis", "heads"), False),
        (("basis", "units"), False),
    }


def test_every_method_of_one_kind_is_a_candidate() -> None:
    """In every width that numbers may have, with the floors that it would be given by itself, and
    as dense weights in few bits."""
    widths = (16, 8, 4)
    for kinds, based in ((["units"], True), ([], True), (["units"], False)):
        found = trials("quick", mergeable=True, kinds=kinds, bits=widths, based=based)
        assert len({trial.name for trial in found}) == len(found)
        every = {*kinds, *(["basis"] if based else [])}
        sets = {(frozenset(every - set(t.without)), t.bits) for t in found if t.alone}
        alone = {(frozenset({kind}), (bits,)) for kind in every for bits in widths}
        dense = {(frozenset[str](), bits) for bits in ((8,), (4,), (8, 4))}
        assert sets == alone | dense
        floors = {(t.floor, t.blend) for t in found if t.bits == (8,) and set(t.without) != every}
        assert floors == {(0.0, 0.0), (0.3, 0.0), (0.6, 0.0), (0.0, 0.5)}
    assert not any(t.alone for t in trials("quick", mergeable=True, bits=[16]))
    assert len(trials("off", mergeable=True, kinds=["units"], bits=widths)) == 1


def test_a_kind_alone_is_left_out_where_its_prediction_says_enough() -> None:
    assert is_far(4.1, [1.0, 2.0])
    assert not is_far(3.9, [1.0, 2.0])
    assert is_far(2.1, [1.0], tried=True)
    assert not is_far(9.0, [])


def test_sets_of_kinds_that_are_far_worse_are_not_tried_again() -> None:
    todo = trials("quick", mergeable=False, kinds=["units", "heads"])
    lost = {trial.name: 1.0 for trial in todo}
    lost |= {"planned, bases alone": 4.1, "planned, without heads": 3.9, "floor 0.3": 9.0}
    tried = [Tried(name, 0.0, loss, 1, 1, 1, 0.0) for name, loss in lost.items()]
    left_out = {trial.name for trial in todo} - {trial.name for trial in again(todo, tried)}
    assert left_out == {"planned, bases alone", "uniform, activation error"}
    alone = {trial.name for trial in todo if trial.alone}  # what was left out before
    fewer = again(todo, [one for one in tried if one.trial not in alone])
    assert {trial.name for trial in todo} - {trial.name for trial in fewer} == left_out | alone
    none = [dataclasses.replace(one, measured=one.measured - 1.0) for one in tried]
    assert len(again(todo, none)) == len(todo) - 1  # what gains nothing is no measure


def test_finalists_are_the_best_of_each_set_that_is_near_the_best() -> None:
    plans = [
        plan("all", 1.0),
        plan("all, worse", 1.2),
        plan("bases", 1.4, "units", "heads"),
        plan("no heads", 1.6, "heads"),
    ]
    assert [one.trial.name for one in finalists(plans)] == ["bases", "all"]


def test_what_held_back_data_tells_apart_takes_no_more() -> None:
    kept, more = of({"few": [2.0, 2.1, 2.0], "all": [1.0, 1.1, 0.9]}, {"few": [0.0], "all": [9.0]})
    assert kept == "all"
    assert not more.asked


def test_a_close_call_is_decided_on_more_data() -> None:
    """By two calls that were held back all kinds are better, by chance."""
    held = {"few": [1.0, 1.0], "all": [0.9, 1.0]}
    kept, more = of(held, {"few": [1.0, 1.1] * 4, "all": [1.3, 1.4] * 4})
    assert kept == "few"
    assert more.asked
    kept, _ = of(held, {"few": [1.3, 1.4] * 4, "all": [1.0, 1.1] * 4})
    assert kept == "all"


def test_what_cannot_be_told_apart_has_the_fewest_kinds() -> None:
    noisy = {"few": [1.0, 1.2, 1.0, 1.2], "all": [1.2, 0.99, 1.2, 0.99]}
    kept, more = of({"few": [1.0, 1.0], "all": [0.99, 1.0]}, noisy)
    assert kept == "few"
    assert {number for _, number in more.asked} == set(range(4))


@pytest.fixture(scope="module")
def found() -> Any:
    """A model compiled with three kinds and a search."""
    planner = {"kinds": ["basis", "units", "heads"], "search": "quick", "strategy": "separate"}
    return compiled(llama(), ALL, {"params_kept": 0.6}, {**planner, "remeasure": 0})


def test_more_kinds_measure_no_worse_than_fewer_on_what_was_held_back(found: Any) -> None:
    outlook = found.fxshare.plan.outlook
    by_name = {trial.name: trial for trial in outlook.trials}
    apart = ("bases alone", "without")
    fewer = [t for name, t in by_name.items() if any(one in name for one in apart)]
    assert len(fewer) == 10
    whole = [t.measured for t in outlook.trials if t.tokens == outlook.held_back_tokens]
    # which of those that are near each other is kept, more data decides
    assert outlook.measured <= 1.5 * min(whole)
    sets = {trial.without for trial in trials("quick", mergeable=False, kinds=["units", "heads"])}
    assert len(sets) == 6


def test_a_plan_of_all_kinds_measures_no_worse_than_dense_weights_in_few_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is left out by its prediction; and by it what is far worse is."""
    planner = {"kinds": ["basis", "units"], "bits": [16, 8, 4], "strategy": "separate"}
    planner |= {"search": "kinds", "remeasure": 0}
    tried = []
    for far in (lambda *_, **__: False, is_far):
        monkeypatch.setattr(searching, "is_far", far)
        outlook = compiled(llama(), ALL, {"bytes_kept": 0.7}, planner).fxshare.plan.outlook
        alone = [t for t in outlook.trials if t.name == "dense in 8 bits"]
        assert all(t.tokens == outlook.held_back_tokens for t in alone)  # it stays to the end
        least = min(t.measured for t in (*alone, outlook.trials[0]))
        assert outlook.measured <= max(1.5 * least, 1e-4)
        tried.append({t.name for t in outlook.trials})
    assert "dense in 8 bits" in tried[0]
    assert tried[1] < tried[0]


def test_a_plan_of_several_kinds_says_what_each_loses(found: Any) -> None:
    plan = found.fxshare.plan
    kinds = {one.kind: one for one in plan.outlook.kinds}
    there = {one.kind for one in plan.units} | ({"basis"} if plan.groups else set())
    assert len(there) > 1
    assert set(kinds) == there
    assert sum(one.entries for one in kinds.values()) == len(plan.groups) + len(plan.units)
    predicted = sum(one.predicted for one in kinds.values())
    assert predicted == pytest.approx(plan.outlook.predicted - plan.outlook.slope, rel=1e-6)
    assert all(one.measured is not None for one in kinds.values())


def test_losses_by_kind_are_those_of_models_with_one_kind(found: Any) -> None:
    """The plan with one kind alone, carried out, loses what is said of it."""
    plan = found.fxshare.plan
    held = batches()[-1:]
    model = llama()

    def loss(module: Any) -> float:
        with torch.no_grad():
            logits = module(held[0])[:, :-1].flatten(0, 1)
        targets = held[0][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    kind = next(one for one in plan.outlook.kinds if one.kind != "basis")
    own = tuple(one for one in plan.units if one.kind == kind.kind)
    alone = plan.model_copy(update={"groups": (), "units": own, "outlook": None})
    gm = compiled(model, ALL, plan=alone, calibration=batches()[:-1])
    lost = (loss(gm) - loss(model)) / plan.outlook.held_back_tokens
    assert lost == pytest.approx(kind.measured, rel=1e-2, abs=1e-6)
    assert kind.measured != pytest.approx(plan.outlook.measured, rel=1e-3)


def test_a_search_without_other_kinds_compares_no_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "decided", lambda *_: pytest.fail("there is one set"))
    gm = compiled(llama(), ALL, {"params_kept": 0.6}, {"strategy": "separate"})
    assert gm.fxshare.plan.outlook.kinds == ()
