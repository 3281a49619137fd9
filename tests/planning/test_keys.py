"""Queries and keys of attention under one budget with the other kinds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxshare
from fxshare import Plan
from fxshare.capture import capture
from fxshare.compiling.replan import replan
from fxshare.config import Planner, load_config
from fxshare.errors import FxShareWarning
from fxshare.factors.spectra import Spectra
from fxshare.planning.kinds.keys import AttentionKeys, KeysByKeys
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.named import kinds_and_parts, others_of
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import Options
from fxshare.planning.solver.curve import DENSE
from fxshare.plans.keys import Keys, keys_of
from fxshare.sites.match import match
from fxshare.sites.scores import Scores
from fxshare.sites.site import Site, SliceSpec
from tests.planning.build import slice_of
from tests.planning.models import batches, compiled, llama, types

ALL = types("q", "k", "v", "o", "gate", "up", "down")
BY_KEYS = "fxshare.planning.kinds.keys:KeysByKeys"
ALONE = {"kinds": ["keys"], "search": "off"}


@functools.cache
def alone() -> tuple[Any, Any]:
    """A model, and it compiled with keys and nothing else; tests must not change them."""
    model = llama()
    return model, compiled(model, ALL, {"params_kept": 0.94}, ALONE)


def test_keys_alone_leave_everything_else_dense_and_keep_the_budget() -> None:
    model, gm = alone()
    plan: Plan = gm.fxshare.plan
    assert plan.units
    assert not plan.groups
    assert {one.kind for one in plan.units} == {"keys"}
    assert all(isinstance(one, Keys) and one.rotary == "none" for one in plan.units)
    assert plan.params_kept <= 0.94
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in gm.parameters())
    assert gone == plan.dense_numbers - plan.stored_numbers
    assert fxshare.verify(model, gm).ok
    assert plan.outlook is not None
    losses = [one.loss or 0.0 for one in plan.units]
    assert sum(losses) == pytest.approx(plan.outlook.predicted, rel=1e-6)


def test_a_plan_with_keys_is_made_again_from_its_file() -> None:
    model, gm = alone()
    plan = Plan.from_json(gm.fxshare.plan.to_json())
    assert plan == gm.fxshare.plan
    again = compiled(model, ALL, plan=plan)
    ids = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids), gm(ids), rtol=1e-4, atol=1e-4)


def test_all_kinds_compete_and_none_takes_what_another_has() -> None:
    model = llama()
    planner = {"kinds": ["basis", "units", "heads", "keys"], "search": "quick"}
    gm = compiled(model, ALL, {"params_kept": 0.6}, planner)
    plan = gm.fxshare.plan
    assert plan.params_kept <= 0.6
    assert fxshare.verify(model, gm).ok
    taken = [name for group in plan.groups for name in group.slices]
    taken += [name for one in plan.units for name in one.slices_among(plan.sites)]
    assert len(taken) == len(set(taken))


def test_the_search_measures_what_narrower_keys_lose() -> None:
    """The judge leaves keys as they are, and puts queries in their place."""
    model = llama()
    gm = compiled(model, ALL, {"params_kept": 0.94}, {"kinds": ["keys"], "search": "quick"})
    held_back = batches()[-1:]

    def loss(module: Any) -> float:
        with torch.no_grad():
            logits = module(held_back[0])[:, :-1].flatten(0, 1)
        targets = held_back[0][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    outlook = gm.fxshare.plan.outlook
    found = (loss(gm) - loss(model)) / outlook.held_back_tokens
    assert found == pytest.approx(outlook.measured, rel=1e-2, abs=1e-6)


def test_those_chosen_by_the_keys_lose_more_as_predicted() -> None:
    _, gm = alone()
    planner = {"kinds": [BY_KEYS], "search": "off"}
    by_keys = compiled(llama(), ALL, {"params_kept": 0.94}, planner)
    assert {one.kind for one in by_keys.fxshare.plan.units} == {"keys_by_keys"}
    predicted = [x.fxshare.plan.outlook.predicted for x in (gm, by_keys)]
    assert predicted[0] < predicted[1]


def test_a_work_folder_plans_other_budgets_with_keys(tmp_path: Path) -> None:
    cfg = {**ALL, "budget": {"params_kept": 0.96}, "planner": ALONE}
    first = fxshare.plan(llama(), cfg, calibration=batches(), work=tmp_path)
    same = replan(tmp_path, overrides=["budget.params_kept=0.96"]).plan
    assert [(u.kept, u.consumer) for u in same.units] == [(u.kept, u.consumer) for u in first.units]
    less = replan(tmp_path, overrides=["budget.params_kept=0.93"]).plan
    assert less.params_kept <= 0.93


def test_a_kind_that_fits_nothing_says_why() -> None:
    cfg = {**types("q", "up"), "budget": {"params_kept": 0.8}}
    cfg["planner"] = {"kinds": ["basis", "keys"], "search": "off"}
    with pytest.warns(FxShareWarning, match="found no queries and keys that may be narrower"):
        plan = fxshare.plan(llama(), cfg, calibration=batches())
    assert not plan.units


# The curve

WIDTH, IN = 6, 5


def scores(rotary: Any = "none", rotated: int = 0) -> tuple[Scores, dict[str, Any]]:
    sizes = {"q": 4 * WIDTH, "k": 2 * WIDTH}
    owned = {}
    for name, out in sizes.items():
        s = SliceSpec(name=name, start=0, stop=out)
        site = Site(
            name=name,
            calls=(name,),
            type=name,
            layer=2,
            in_features=IN,
            out_features=out,
            bias=False,
            slices=(s,),
        )
        owned[name] = (site, s)
    slices = {name: slice_of(out, IN, 0, input="x") for name, out in sizes.items()}
    return Scores((owned["q"],), (owned["k"],), WIDTH, rotary, rotated), slices


@pytest.mark.parametrize("kind", [AttentionKeys(), KeysByKeys()])
@pytest.mark.parametrize(
    ("rotary", "rotated", "widths"),
    [
        ("none", 0, [1, 2, 3, 4, 5, 6]),
        ("halves", 6, [2, 4, 6]),
        ("neighbours", 6, [2, 4, 6]),
    ],
)
def test_the_curve_counts_both_linears_and_parts_no_pair(
    kind: AttentionKeys, rotary: Any, rotated: int, widths: list[int]
) -> None:
    one, slices = scores(rotary, rotated)
    assert (one.heads, one.kv_heads) == (4, 2)
    nodes = nodes_of(tuple(one.sites.values()), slices)
    for unit, factor in (("numbers", 1), ("bytes", 4), ("flops", 2)):
        scene = Scene((one,), nodes, Spectra(slices), Options(unit=unit))
        (found,) = others_of((kind,), scene).values()
        curve = found.curve
        assert curve.cost.tolist() == [factor * n * 6 * IN for n in widths]
        assert curve.label[-1] == DENSE
        assert curve.loss[-1] == 0.0
        assert (curve.loss[:-1] > 0).all()
        assert curve.side is not None
        assert curve.side.tolist() == [2 * n * 6 * IN for n in widths]
        if not kind.by_keys:
            assert (np.diff(curve.loss) < 0).all()
    entry = kind.entry(found, widths[0], 0.5)
    expected = keys_of(one, kept=widths[0], loss=0.5)
    assert entry == expected.model_copy(update={"kind": kind.name})
    assert entry.stored_numbers == widths[0] * 6 * IN


def test_layers_kept_dense_ties_and_few_bits_leave_them_out() -> None:
    one, slices = scores()
    nodes = nodes_of(tuple(one.sites.values()), slices)
    for options in (
        Options(tie=(frozenset({"q", "another"}),)),
        Options(keep_dense=frozenset({2})),
        Options(bits=(8,)),
    ):
        scene = Scene((one,), nodes, Spectra(slices), options)
        assert not AttentionKeys().candidates(scene)
    multiple = Scene((one,), nodes, Spectra(slices), Options(rank_multiple=4))
    (found,) = AttentionKeys().candidates(multiple)
    assert found.curve.label.tolist() == [4, DENSE]


def test_without_the_models_dtype_among_the_bits_it_is_said_that_none_compete() -> None:
    planner = Planner(kinds=("basis", "keys"), bits=(8, 4))
    captured = capture(llama(), batches()[0])
    sites = match(captured.model, load_config(types("q", "k"))).sites
    with pytest.warns(FxShareWarning, match=r"planner.bits \[8, 4\] none compete; add 16"):
        kinds_and_parts(planner, captured, sites)
