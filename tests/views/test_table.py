"""The words and tables of a plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxshare.config import ShareConfig, WeightType
from fxshare.errors import PlanError
from fxshare.planning.rules import exact_plan
from fxshare.planning.sweep import Alternative, Sweep, SweepPoint
from fxshare.plans.outlook import Outlook, TrialResult
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import PLAIN
from fxshare.plans.units import Units
from fxshare.sites.site import Site, Skipped, SliceSpec
from fxshare.views.table import (
    dense_lines,
    groups_table,
    head_lines,
    layers_text,
    outlook_lines,
    sweep_table,
    trials_table,
    why_dense,
)


def site(layer: int, *, size: int = 8) -> Site:
    name = f"h.{layer}.fc"
    return Site(
        name=name,
        calls=(name,),
        type="fc",
        layer=layer,
        in_features=size,
        out_features=size,
        bias=False,
        slices=(SliceSpec(name=name, start=0, stop=size),),
    )


def group(*layers: int, rank: int = 3, loss: float | None = 0.25) -> Group:
    return Group(
        name="basis_fc",
        type="fc",
        label="",
        layers=layers,
        slices=tuple(f"h.{layer}.fc" for layer in layers),
        in_features=8,
        out_features=8 * len(layers),
        rank=rank,
        loss=loss,
    )


OUTLOOK = Outlook(
    loss_name="next-token cross-entropy",
    unit="numbers",
    budget=200,
    cost=199,
    price=0.001,
    predicted=0.25,
    bound=0.2,
    gap=0.05,
    measured=0.3,
    strategy="layers",
    trial="planned",
    refit=True,
    trials=(
        TrialResult(
            name="planned",
            predicted=0.25,
            measured=0.3,
            tokens=640,
            cost=199,
            groups=1,
            seconds=0.5,
        ),
        TrialResult(name="floor 0.3", predicted=0.3, measured=None, cost=180, groups=2, seconds=1),
    ),
    held_back_tokens=640,
    seconds=2.0,
)


def planned(outlook: Outlook | None = OUTLOOK, *, size: int = 8) -> Plan:
    sites = [site(0, size=8), site(1, size=8), site(2, size=size)]
    return Plan(mode="planned", sites=tuple(sites), groups=(group(0, 1),), outlook=outlook)


def config(**planner: Any) -> ShareConfig:
    return ShareConfig(
        weight_types={"fc": WeightType(pattern="x")},
        budget={"params_kept": 0.5},  # type: ignore[arg-type]
        planner=planner,  # type: ignore[arg-type]
    )


def test_a_row_has_sizes_flops_and_the_predicted_loss() -> None:
    header, [row] = groups_table(planned())
    found = dict(zip(header, row, strict=True))  # of two columns "after" the last, FLOPs
    assert found["in→out"] == "8→16"
    assert found["numbers before"] == "128"
    # rank (2 inputs of 8 each, 16 outputs), 2 FLOPs a weight
    assert (found["FLOPs/token before"], found["after"]) == ("256", str(2 * 3 * (2 * 8 + 16)))
    assert found["break-even"] == "5"
    assert found["kept"] == f"{3 * 24 / 128:.3f}"
    assert found["predicted Δloss"] == "2.500e-01"
    unpriced = planned().model_copy(update={"groups": (group(0, 1, loss=None),)})
    assert "predicted Δloss" not in groups_table(unpriced)[0]


@pytest.mark.parametrize(
    ("layers", "text"), [((), "–"), ((3,), "3"), ((0, 1), "0,1"), ((0, 1, 2, 5, 7, 8), "0-2,5,7,8")]
)
def test_layers_are_written_as_runs(layers: tuple[int, ...], text: str) -> None:
    assert layers_text(layers) == text


def test_totals() -> None:
    lines = head_lines(planned(), element_size=2)
    assert lines[0] == "planned mode: 3 sites, 3 slices, 1 groups"
    assert "192 weights → 136 stored numbers" in lines[1]
    assert lines[2].endswith("bytes: 384 → 272")
    assert "bytes" not in head_lines(planned())[2]


def test_the_price_and_what_the_best_option_would_have_cost() -> None:
    alternative = Alternative(rank=3, storage=PLAIN, saved=16, loss=0.02)
    [line] = dense_lines(planned(), config(), {"h.2.fc": alternative})
    assert line == (
        "dense: h.2.fc, 64 numbers: at the price of 0.001 per number no rank below dense is worth "
        "its loss: rank 3 plain would save 16 numbers, worth 0.016, and lose 0.02"
    )


def test_a_plan_that_is_not_the_optimum_of_its_prediction_says_so() -> None:
    cheap = Alternative(rank=3, storage=PLAIN, saved=16, loss=0.001)
    [line] = dense_lines(planned(), config(), {"h.2.fc": cheap})
    assert "the plan that measured best (planned) keeps it dense" in line


@pytest.mark.parametrize(
    ("plan", "planner", "reason"),
    [
        (planned(), {"keep_dense": [2]}, "planner.keep_dense has layer 2"),
        (planned(size=1), {}, "no rank stores fewer numbers than the 1 of dense"),
        (planned(), {"rank_multiple": 8}, "no rank that is a multiple of 8 stores fewer numbers"),
        (planned(), {"floor": 0.99, "storage": "plain"}, "planner.floor 0.99: no rank stores"),
        (planned(), {}, "at the price of 0.001 per number no rank below dense is worth its loss"),
        (
            planned(OUTLOOK.model_copy(update={"price": 0.0})),
            {},
            "the budget has room for it",
        ),
        (planned(None), {}, "the budget keeps it whole, or the plan was edited"),
        (planned(), {"kinds": ["units", "heads"]}, "planner.kinds are units, heads: no bases"),
        (planned().model_copy(update={"mode": "sharing"}), {}, "it is in no group of the plan"),
        (exact_plan(planned().sites), {}, "the exact mode compresses nothing"),
    ],
)
def test_every_reason_to_stay_dense(plan: Plan, planner: dict[str, Any], reason: str) -> None:
    last = plan.sites[-1]
    assert why_dense(plan, last, last.slices[0], config(**planner)).startswith(reason)


def test_equal_reasons_are_one_line() -> None:
    plan = exact_plan(
        [site(layer) for layer in range(9)],
        [Skipped(name=f"x.{n}", type="fc", reason="is an Embedding") for n in range(2)],
    )
    dense, skipped = dense_lines(plan)
    assert dense.startswith("dense: 9 slices (h.0.fc, h.1.fc, ")
    assert "and 3 more), 576 numbers" in dense
    assert skipped == "not rewritten: x.0, x.1 (fc): is an Embedding"


def test_the_outlook_and_its_search() -> None:
    lines = outlook_lines(planned(), config(search="thorough"))
    assert "dual bound 0.2, gap 0.05" in lines[1]
    assert lines[2] == "measured 0.3 per token on 640 held-back tokens"
    assert lines[3].startswith("search: thorough, 2 plans, 2.0 s; kept: planned")
    _, rows = trials_table(planned())
    assert [row[1] for row in rows] == ["*", ""]
    assert (rows[0][3:5], rows[1][3:5]) == (["0.3", "640"], ["–", "–"])
    twice = OUTLOOK.model_copy(update={"trials": (OUTLOOK.trials[0], *OUTLOOK.trials)})
    assert [row[1] for row in trials_table(planned(twice))[1]] == ["*", "", ""]
    assert trials_table(planned(None))[1] == []
    assert "losses are not known" in outlook_lines(planned(None))[0]
    assert outlook_lines(exact_plan(planned().sites)) == []


def test_the_table_of_a_sweep() -> None:
    points = (SweepPoint(0.5, 0.49, 0.1, 0.09, 3), SweepPoint(1.0, 1.0, 0.0, 0.0, 0))
    _, rows = sweep_table(Sweep("numbers", 100, "loss", points, points[1:]))
    assert rows[0] == ["0.5000", "0.4900", "3", "0.1", "0.09", "–", "–"]
    assert rows[1][-1] == "0"


def test_what_was_measured_of_a_sweep_has_a_column() -> None:
    points = (SweepPoint(0.5, 0.49, 0.1, 0.09, 3, 0.3), SweepPoint(1.0, 1.0, 0.0, 0.0, 0))
    header, rows = sweep_table(Sweep("numbers", 100, "loss", points, points[1:]))
    assert header[-1] == "planned, measured Δloss"
    assert [row[-1] for row in rows] == ["0.3", "–"]


# what a plan's file may say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"rank": 9}, "group 'basis_fc': rank 9 is outside 1..8"),
        ({"out_features": 17}, "group 'basis_fc' says out_features 17, its slices have 16"),
        ({"in_features": 9}, "group 'basis_fc' says in_features 9, its slices read [8]"),
        (
            {"slices": ["h.0.fc", "h.0.fc"]},
            "slice 'h.0.fc' is in group 'basis_fc' and in 'basis_fc'",
        ),
        (
            {"slices": ["h.0.fc", "h.11.fc"]},
            "group 'basis_fc': 'h.11.fc' is not a slice of any site; did you mean 'h.1.fc'?",
        ),
        ({"colour": "red"}, "group 'basis_fc': colour: unknown key; found 'red'"),
        ({"rank": "high"}, "group 'basis_fc': rank: Input should be a valid integer"),
        ({"storage": "zip"}, "group 'basis_fc': storage: Input should be 'plain' or 'pivoted'"),
        ({"name": None}, "groups.0: name: Input should be a valid string"),
    ],
)
def test_a_fault_of_a_group_names_it(edit: dict[str, Any], message: str) -> None:
    plain = planned().model_dump(mode="json")
    plain["groups"][0].update(edit)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(plain))
    assert message in str(caught.value)


# the pages ------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_page_names_every_key_and_its_example_holds() -> None:
    page = (DOCS / "reference" / "plan.md").read_text(encoding="utf-8")
    for section in (Plan, Site, SliceSpec, Group, Units, Skipped, Outlook, TrialResult):
        for name in section.model_fields:
            assert f"`{name}`" in page, name
    (example,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    assert Plan.from_json(example).stored_numbers == 5 * (8 + 32)
