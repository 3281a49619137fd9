"""Kinds of candidates under one budget: hidden units, and one of one's own."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxshare
from fxshare import Plan
from fxshare.compiling.replan import replan
from fxshare.compiling.survey import survey
from fxshare.config import load_config
from fxshare.errors import ConfigError, FxShareWarning, PlanError
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.named import kinds_named, others_of
from fxshare.planning.kinds.units import HiddenUnits
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import Options
from fxshare.planning.solver.curve import DENSE
from fxshare.planning.trials import trials
from fxshare.plans.units import units_of
from fxshare.result.products import slices_of
from fxshare.sites.mlps import Mlp
from fxshare.sites.site import Site, SliceSpec
from tests.planning.build import slice_of
from tests.planning.models import PLAIN, batches, compiled, features, llama, plain_model, types

ALL = types("q", "k", "v", "o", "gate", "up", "down")
OWN = "tests.planning.own_kind:Loudest"
BOTH = {"kinds": ["basis", "units"], "search": "off", "strategy": "separate"}


@functools.cache
def both(search: str = "off", share: float = 0.6) -> tuple[Any, Any]:
    """A model, and it compiled with both kinds; tests must not change them."""
    model = llama()
    planner = {**BOTH, "search": search, "strategy": "grown"}
    return model, compiled(model, ALL, {"params_kept": share}, planner)


def test_a_plan_of_both_kinds_keeps_its_budget_and_is_carried_out() -> None:
    model, gm = both()
    plan: Plan = gm.fxshare.plan
    assert plan.units
    assert plan.params_kept <= 0.6
    names = {f"{site.name}.weight" for site in plan.sites}
    before = sum(p.numel() for n, p in model.named_parameters() if n in names)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in gm.parameters())
    indices = sum(g.stored_as.indices(g.rank) for g in plan.groups)
    assert plan.dense_numbers == before
    assert gone == before - plan.stored_numbers + indices
    assert fxshare.verify(model, gm).ok
    assert not {name for g in plan.groups for name in g.slices} & {
        s.name
        for one in plan.units
        for site in plan.sites
        if site.name in one.sites
        for s in site.slices
    }
    outlook = plan.outlook
    assert outlook is not None
    losses = [one.loss for one in (*plan.groups, *plan.units)]
    assert sum(loss or 0.0 for loss in losses) == pytest.approx(outlook.predicted, rel=1e-6)
    assert outlook.bound <= outlook.predicted


def test_a_search_tries_each_kind_alone_and_all_together() -> None:
    _, gm = both("quick")
    names = [trial.name for trial in gm.fxshare.plan.outlook.trials]
    assert {"planned", "planned, bases alone", "planned, others wherever they fit"} <= set(names)
    assert "uniform" in names
    assert any(name.endswith("remeasured") for name in names)
    alone = [t.name for t in trials("quick", mergeable=False)]
    assert not any("alone" in name or "without" in name for name in alone)
    assert len(trials("off", mergeable=True, kinds=["units"])) == 1
    assert {t.without for t in trials("quick", mergeable=False, kinds=["units"])} == {
        (),
        ("units",),
        ("basis",),
    }


def test_what_the_search_measures_is_what_the_result_loses() -> None:
    """The judge leaves producers as they are and zeroes columns; the result has smaller linears."""
    model, gm = both("quick")
    held_back = batches()[-1:]

    def loss(module: Any) -> float:
        with torch.no_grad():
            logits = module(held_back[0])[:, :-1].flatten(0, 1)
        targets = held_back[0][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    outlook = gm.fxshare.plan.outlook
    found = (loss(gm) - loss(model)) / outlook.held_back_tokens
    assert found == pytest.approx(outlook.measured, rel=1e-2, abs=1e-6)


def test_units_alone_leave_everything_else_dense() -> None:
    model = llama()
    planner = {**BOTH, "kinds": ["units"]}
    gm = compiled(model, ALL, {"params_kept": 0.75}, planner)
    plan = gm.fxshare.plan
    assert not plan.groups
    assert plan.units
    assert plan.params_kept <= 0.75
    with pytest.raises(PlanError, match="below the cheapest plan"):
        compiled(model, ALL, {"params_kept": 0.2}, planner)


@pytest.mark.parametrize("budget", [{"max_bytes": 14_000}, {"flops_kept": 0.7}])
def test_budgets_in_other_units_are_kept(budget: dict[str, Any]) -> None:
    model = llama()
    gm = compiled(model, ALL, budget, BOTH)
    assert gm.fxshare.plan.units
    report = gm.fxshare.report
    if "max_bytes" in budget:
        whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        matched = sum(row.bytes_before for row in report.groups)
        assert whole - matched + sum(row.bytes_after for row in report.groups) <= 14_000
    else:
        flops = [sum(getattr(r, f"flops_{w}") for r in report.groups) for w in ("before", "after")]
        assert flops[1] <= 0.7 * flops[0]


def test_layers_kept_dense_floors_and_multiples_hold_for_units() -> None:
    planner = {**BOTH, "keep_dense": [0], "floor": 0.5, "rank_multiple": 4}
    gm = compiled(llama(), ALL, {"params_kept": 0.8}, planner)
    units = gm.fxshare.plan.units
    assert units
    assert all(one.layers != (0,) for one in units)
    assert all(one.kept % 4 == 0 and one.kept >= one.of / 2 for one in units)


def test_a_plan_of_both_kinds_is_made_again_from_its_file(tmp_path: Path) -> None:
    model, gm = both()
    plan = Plan.from_json(gm.fxshare.plan.to_json())
    assert plan == gm.fxshare.plan
    again = compiled(model, ALL, plan=plan)
    for name, tensor in gm.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_work_folder_plans_other_budgets_with_both_kinds(tmp_path: Path) -> None:
    model = llama()
    cfg = {**ALL, "budget": {"params_kept": 0.6}, "planner": BOTH}
    first = fxshare.plan(model, cfg, calibration=batches(), work=tmp_path)
    assert list((tmp_path / "spectra").glob("*.order"))
    again = fxshare.plan(model, cfg, calibration=batches(), work=tmp_path)
    assert (again.groups, again.units) == (first.groups, first.units)
    same = replan(tmp_path, overrides=["budget.params_kept=0.6"]).plan
    assert [(u.kept, u.consumer) for u in same.units] == [(u.kept, u.consumer) for u in first.units]
    less = replan(tmp_path, overrides=["budget.params_kept=0.4"], shares=(0.4, 0.8))
    assert less.plan.params_kept <= 0.4
    assert less.sweep is not None


def test_a_work_folder_without_the_kind_says_so(tmp_path: Path) -> None:
    model = llama()
    cfg = {**ALL, "budget": {"params_kept": 0.6}, "planner": {**BOTH, "kinds": ["basis"]}}
    fxshare.plan(model, cfg, calibration=batches(), work=tmp_path)
    with pytest.raises(PlanError, match=r"hidden units that '.*' reads were not priced in"):
        replan(tmp_path, overrides=["planner.kinds=[basis,units]"])


def test_a_survey_has_both_kinds() -> None:
    model = llama()
    cfg = {**ALL, "budget": {"params_kept": 0.6}, "planner": BOTH}
    found = survey(model, cfg, calibration=batches(), shares=(0.5,))
    assert found.plan.units
    without = {**cfg, "planner": {**BOTH, "kinds": ["basis"]}}
    alone = survey(model, without, calibration=batches(), shares=(0.5,))
    assert found.sweep is not None
    assert alone.sweep is not None
    assert found.sweep.planned[0].loss <= alone.sweep.planned[0].loss + 1e-12


def test_a_kind_of_ones_own_competes_and_is_named_in_the_plan() -> None:
    model = llama()
    planner = {**BOTH, "kinds": ["basis", OWN]}
    gm = compiled(model, ALL, {"params_kept": 0.6}, planner)
    plan = gm.fxshare.plan
    assert {one.kind for one in plan.units} == {"loudest"}
    assert fxshare.verify(model, gm).ok
    kept = {
        place.unit_columns.name: place.unit_columns.kept
        for place in slices_of(gm).values()
        if place.unit_columns is not None
    }
    read = Plan.from_json(plan.to_json())
    again = compiled(model, ALL, {"params_kept": 0.6}, planner, plan=read)
    assert kept == {
        place.unit_columns.name: place.unit_columns.kept
        for place in slices_of(again).values()
        if place.unit_columns is not None
    }
    with pytest.raises(PlanError, match="are of kind 'loudest', which is not known"):
        compiled(model, ALL, plan=read)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (
            ["basis", "layer"],
            "expected basis, units, heads, keys or 'package.module:Name'; found 'layer'",
        ),
        (["tests.nowhere:Kind"], "cannot import 'tests.nowhere:Kind'"),
        (["tests.planning.own_kind:Missing"], "cannot import 'tests.planning.own_kind:Missing'"),
        (["tests.planning.own_kind:Nothing"], "is a Nothing without candidates"),
        (["units", "units"], "two kinds are called 'units'"),
        ([":Kind"], "expected 'package.module:Name'; found ':Kind'"),
        ([".own_kind:Kind"], "expected 'package.module:Name'; found '.own_kind:Kind'"),
        (["tests.planning.own_kind:Raising"], "made without arguments: ValueError: never"),
        (["tests.planning.own_kind:Spaced"], "'two words'"),
        (["tests.planning.own_kind:Units"], "called 'units', which is a kind of fxshare"),
    ],
)
def test_what_is_no_kind_is_refused_before_anything_is_measured(
    kinds: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kinds_named(kinds)
    assert reason in str(caught.value)
    planner = {"search": "off", "kinds": kinds}
    cfg = {**ALL, "budget": {"params_kept": 0.6}, "planner": planner}

    def unread() -> Any:
        yield batches()[0]
        yield batches()[0]
        raise AssertionError("calibrated before the kinds were looked at")

    with pytest.raises(ConfigError, match=r"planner\.kinds"):
        fxshare.compile(llama(), cfg, calibration=unread())


@pytest.mark.parametrize("text", ["def (:", "raise RuntimeError('no')"])
def test_a_kind_may_lie_in_the_current_folder_and_a_module_that_fails_says_why(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, name = list(sys.path), f"own_{len(text)}"
    Path(f"{name}.py").write_text("from tests.planning.own_kind import Loudest")
    Path(f"broken_{name}.py").write_text(text)
    assert [one.name for one in kinds_named([f"{name}:Loudest"])] == ["loudest"]
    with pytest.raises(ConfigError, match=rf"importing 'broken_{name}:A' failed: \w+Error: "):
        kinds_named([f"broken_{name}:A"])
    assert sys.path == path


def test_no_kind_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="kinds"):
        load_config({**ALL, "budget": {"params_kept": 0.6}, "planner": {"kinds": []}})


def test_a_kind_that_fits_nothing_says_why() -> None:
    cfg = {**types("q", "o"), "budget": {"params_kept": 0.8}, "planner": BOTH}
    with pytest.warns(FxShareWarning, match="found no MLP.*'layers.0.q_proj' reads what is"):
        plan = fxshare.plan(llama(), cfg, calibration=batches())
    assert not plan.units


def test_an_mlp_with_biases_that_is_no_language_model() -> None:
    model = plain_model()
    gm = compiled(model, PLAIN, {"params_kept": 0.6}, BOTH, calibration=features())
    assert gm.fxshare.plan.units
    assert fxshare.verify(model, gm).ok
    kept = gm.fxshare.plan.units[0].kept
    assert gm.down.weight.shape == (8, kept)
    # the mean of what goes is in the bias
    with torch.no_grad():
        gap = torch.cat([gm(x) - model(x) for x in features()]).mean(0)
        spread = torch.cat([gm(x) - model(x) for x in features()]).std()
    assert gap.abs().max() < 0.1 * spread


# The curve


def mlp(units: int = 6) -> tuple[Mlp, dict[str, SliceStatistics]]:
    sizes = {"up": (4, units), "down": (units, 3)}
    sites = {
        name: Site(
            name=name,
            calls=(name,),
            type=name,
            layer=2,
            in_features=a,
            out_features=b,
            bias=False,
            slices=(SliceSpec(name=name, start=0, stop=b),),
        )
        for name, (a, b) in sizes.items()
    }
    slices = {name: slice_of(b, a, 0, input=name) for name, (a, b) in sizes.items()}
    slices["down"] = slice_of(3, units, 1, input="h", gram_II=torch.eye(units).double())
    return Mlp((sites["up"],), sites["down"]), slices


def test_the_curve_counts_every_linear_and_ends_dense() -> None:
    one, slices = mlp()
    spectra = Spectra(slices)
    nodes = nodes_of((*one.producers, one.consumer), slices)
    for unit, factor in (("numbers", 1), ("bytes", 4), ("flops", 2)):
        scene = Scene((one,), nodes, spectra, Options(unit=unit))
        (found,) = others_of((HiddenUnits(),), scene).values()
        curve = found.curve
        assert curve.cost.tolist() == [factor * n * (4 + 3) for n in range(1, 7)]
        assert curve.label[-1] == DENSE
        assert curve.loss[-1] == 0.0
        assert (np.diff(curve.loss) <= 0).all()
        assert curve.side is not None
        assert curve.side.tolist() == [2 * n * 7 for n in range(1, 7)]
    order = HiddenUnits().order({"down": slices["down"]})
    assert curve.loss.tolist() == pytest.approx(order.lost[1:].tolist())
    entry = HiddenUnits().entry(found, 4, 0.5)
    assert entry == units_of(one.producers, one.consumer, kept=4, loss=0.5)


def test_an_mlp_that_a_tie_would_tear_is_no_candidate() -> None:
    one, slices = mlp()
    nodes = nodes_of((*one.producers, one.consumer), slices)
    options = Options(tie=(frozenset({"up", "another"}),))
    scene = Scene((one,), nodes, Spectra(slices), options)
    assert not HiddenUnits().candidates(scene)


def test_plans_without_units_are_written_as_before() -> None:
    gm = compiled(llama(), types("q"), {"params_kept": 0.7}, {"search": "off"})
    plain = json.loads(gm.fxshare.plan.to_json())
    assert plain["version"] == 1
    assert "units" not in plain
