"""Heads of attention under one budget with bases and hidden units."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxshare
from fxshare import Plan
from fxshare.compiling.replan import replan
from fxshare.errors import FxShareWarning
from fxshare.factors.heads import widths_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import metric_of
from fxshare.factors.whole_heads import whole_heads_order
from fxshare.planning.kinds.heads import AttentionHeads, NarrowerHeads
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.named import others_of
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import Options
from fxshare.planning.solver.curve import DENSE
from fxshare.plans.heads import Heads, heads_of
from fxshare.plans.whole_heads import WholeHeads, whole_heads_of
from fxshare.sites.attention import Attention
from fxshare.sites.head_groups import HeadGroups
from fxshare.sites.site import Site, SliceSpec
from tests.planning.build import slice_of
from tests.planning.models import batches, compiled, llama, types

ALL = types("q", "k", "v", "o", "gate", "up", "down")
EACH = {"kinds": ["basis", "units", "heads"], "search": "off", "strategy": "separate"}
ALONE = {**EACH, "kinds": ["heads"]}


@functools.cache
def alone(share: float = 0.92) -> tuple[Any, Any]:
    """A model, and it compiled with heads and nothing else; tests must not change them."""
    model = llama()
    return model, compiled(model, ALL, {"params_kept": share}, ALONE)


def test_heads_alone_leave_everything_else_dense_and_keep_the_budget() -> None:
    model, gm = alone()
    plan: Plan = gm.fxshare.plan
    assert plan.units
    assert not plan.groups
    assert {one.kind for one in plan.units} == {"heads"}
    assert plan.params_kept <= 0.92
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in gm.parameters())
    assert gone == plan.dense_numbers - plan.stored_numbers
    assert fxshare.verify(model, gm).ok
    assert plan.outlook is not None
    losses = [one.loss or 0.0 for one in plan.units]
    assert sum(losses) == pytest.approx(plan.outlook.predicted, rel=1e-6)


def test_all_kinds_compete_and_none_takes_what_another_has() -> None:
    model = llama()
    planner = {**EACH, "search": "quick", "strategy": "grown"}
    gm = compiled(model, ALL, {"params_kept": 0.6}, planner)
    plan = gm.fxshare.plan
    assert plan.params_kept <= 0.6
    assert fxshare.verify(model, gm).ok
    taken = [name for group in plan.groups for name in group.slices]
    taken += [name for one in plan.units for name in one.slices_among(plan.sites)]
    assert len(taken) == len(set(taken))
    # what the search measured is what the result loses: the judge leaves values as they are, and
    # turns what reads them
    outlook = plan.outlook
    held_back = batches()[-1:]

    def loss(module: Any) -> float:
        with torch.no_grad():
            logits = module(held_back[0])[:, :-1].flatten(0, 1)
        targets = held_back[0][:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    found = (loss(gm) - loss(model)) / outlook.held_back_tokens
    assert found == pytest.approx(outlook.measured, rel=1e-2, abs=1e-6)


def test_a_plan_with_heads_is_made_again_from_its_file() -> None:
    model, gm = alone()
    plan = Plan.from_json(gm.fxshare.plan.to_json())
    assert plan == gm.fxshare.plan
    assert all(isinstance(one, (Heads, WholeHeads)) for one in plan.units)
    again = compiled(model, ALL, plan=plan)
    ids = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids), gm(ids), rtol=1e-4, atol=1e-4)


def test_a_work_folder_plans_other_budgets_with_heads(tmp_path: Path) -> None:
    cfg = {**ALL, "budget": {"params_kept": 0.92}, "planner": ALONE}
    first = fxshare.plan(llama(), cfg, calibration=batches(), work=tmp_path)
    same = replan(tmp_path, overrides=["budget.params_kept=0.92"]).plan
    assert [(u.kept, u.consumer) for u in same.units] == [(u.kept, u.consumer) for u in first.units]
    less = replan(tmp_path, overrides=["budget.params_kept=0.89"]).plan
    assert less.params_kept <= 0.89
    assert sum(u.kept for u in less.units) < sum(u.kept for u in first.units)


def test_layers_kept_dense_and_multiples_hold_for_heads() -> None:
    planner = {**ALONE, "keep_dense": [0], "rank_multiple": 2}
    planner["kinds"] = ["fxshare.planning.kinds.heads:NarrowerHeads"]  # whole heads go one by one
    gm = compiled(llama(), ALL, {"params_kept": 0.96}, planner)
    assert gm.fxshare.plan.units
    assert all(one.layers != (0,) for one in gm.fxshare.plan.units)
    assert all(one.kept % 2 == 0 for one in gm.fxshare.plan.units)


def test_a_kind_that_fits_nothing_says_why() -> None:
    cfg = {**types("q", "up"), "budget": {"params_kept": 0.8}}
    cfg["planner"] = {**EACH, "kinds": ["basis", "heads"]}
    with pytest.warns(FxShareWarning, match="found no attention.*'layers.0.q_proj' reads what"):
        plan = fxshare.plan(llama(), cfg, calibration=batches())
    assert not plan.units


# The curve

WIDTH, IN, OUT = 4, 5, 3


def sites_of(sizes: dict[str, tuple[int, int]]) -> dict[str, Site]:
    return {
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


def attention(heads: int = 4, kv_heads: int = 2) -> tuple[Attention, dict[str, SliceStatistics]]:
    sizes = {"v": (IN, kv_heads * WIDTH), "o": (heads * WIDTH, OUT)}
    sites = sites_of(sizes)
    slices = {name: slice_of(b, a, 0, input=name) for name, (a, b) in sizes.items()}
    one = Attention(((sites["v"], sites["v"].slices[0]),), sites["o"], WIDTH)
    return one, slices


def test_the_curve_counts_both_linears_and_ends_dense() -> None:
    one, slices = attention()
    assert (one.heads, one.kv_heads) == (4, 2)
    nodes = nodes_of((one.values[0][0], one.consumer), slices)
    for unit, factor in (("numbers", 1), ("bytes", 4), ("flops", 2)):
        scene = Scene((one,), nodes, Spectra(slices), Options(unit=unit))
        (found,) = others_of((AttentionHeads(),), scene).values()
        curve = found.curve
        each = 2 * IN + 4 * OUT
        assert curve.cost.tolist() == [factor * n * each for n in range(1, WIDTH + 1)]
        assert curve.label[-1] == DENSE
        assert curve.loss[-1] == 0.0
        assert (np.diff(curve.loss) <= 0).all()
        assert curve.side is not None
        assert curve.side.tolist() == [2 * n * each for n in range(1, WIDTH + 1)]
    lost = widths_of(slices["o"].gram_II, metric_of([slices["o"]]), 4, 2).lost
    assert curve.loss.tolist() == pytest.approx(lost[1:].tolist())
    entry = AttentionHeads().entry(found, 3, 0.5)
    assert entry == heads_of(one.values, one.consumer, WIDTH, kept=3, loss=0.5)
    assert entry.stored_numbers == 3 * each


def four_weights(heads: int = 4, kv_heads: int = 2) -> tuple[HeadGroups, Scene]:
    wide, narrow = heads * WIDTH, kv_heads * WIDTH
    sizes = {"q": (IN, wide), "k": (IN, narrow), "v": (IN, narrow), "o": (wide, OUT)}
    sites = sites_of(sizes)
    slices = {name: slice_of(b, a, 0, input=name) for name, (a, b) in sizes.items()}
    own = ((sites[name], sites[name].slices[0]) for name in "qkv")
    q, k, v = own
    one = HeadGroups((q,), (k,), (v,), sites["o"], heads, kv_heads)
    nodes = nodes_of(tuple(sites.values()), slices)
    return one, Scene((one,), nodes, Spectra(slices), Options(unit="numbers", rank_multiple=4))


def test_the_curve_of_whole_heads_counts_all_four_linears() -> None:
    one, scene = four_weights(6, 3)
    (found,) = AttentionHeads().candidates(scene)
    assert found.slices == {"q", "k", "v", "o"}
    each = WIDTH * (4 * IN + 2 * OUT)  # two queries, a key and a value, two heads that are read
    # of ranks none but multiples of four are taken; heads are counted one by one
    assert found.curve.cost.tolist() == [each, 2 * each, 3 * each]
    assert found.curve.label[-1] == DENSE
    assert found.curve.loss[-1] == 0.0
    o = scene.slices["o"]
    lost = whole_heads_order(o.gram_II, metric_of([o]), 3).lost
    assert found.curve.loss.tolist() == pytest.approx(lost[1:].tolist())
    entry = AttentionHeads().entry(found, 2, 0.5)
    assert entry == whole_heads_of(one, kept=2, loss=0.5)
    assert entry.stored_numbers == 2 * each
    assert entry.cached == (3 * 2 * WIDTH, 2 * 2 * WIDTH)
    assert not NarrowerHeads().candidates(scene)
    tied = replace(scene, options=Options(tie=(frozenset({"k", "another"}),)))
    assert not AttentionHeads().candidates(tied)


def test_narrower_and_fewer_heads_do_not_overlap_and_are_told_apart() -> None:
    one, scene = four_weights()
    scene = replace(scene, options=Options(unit="numbers"))
    (narrower,) = AttentionHeads().candidates(
        replace(scene, parts=(Attention(one.values, one.consumer, WIDTH),))
    )
    (fewer,) = AttentionHeads().candidates(scene)
    assert narrower.key != fewer.key
    assert narrower.slices < fewer.slices
    kind, consumer = AttentionHeads(), {"o": scene.slices["o"]}
    for candidate in (narrower, fewer):
        entry = kind.entry(candidate, 1, 0.5)
        assert isinstance(scene.spectra, Spectra)
        made = kind.carry_out(entry, consumer, scene.spectra, bias=False)
        assert entry.kind == "heads"
        assert made.lost == pytest.approx(float(candidate.curve.loss[0]), rel=1e-6)


def test_an_attention_that_a_tie_would_tear_is_no_candidate() -> None:
    one, slices = attention()
    nodes = nodes_of((one.values[0][0], one.consumer), slices)
    options = Options(tie=(frozenset({"v", "another"}),))
    assert not AttentionHeads().candidates(Scene((one,), nodes, Spectra(slices), options))


def test_nothing_that_asks_a_kind_names_one() -> None:
    root = Path(fxshare.__file__).parent
    asking = [*(root / "planning" / "solver").glob("*.py"), *(root / "views").glob("*.py")]
    asking += [root / "planning" / f"{name}.py" for name in ("search", "judge", "budget", "made")]
    asking += [root / "result" / "report.py", root / "cli" / "inspect.py", root / "cli" / "why.py"]
    for file in asking:
        text = file.read_text()
        assert "AttentionHeads" not in text, file
        assert '"heads"' not in text, file
        assert "plans.heads" not in text, file
