"""A plan file that names hidden units: carried out, checked, saved, lowered, generated with."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

import fxshare
from fxshare import Plan
from fxshare.compiling.stages import prepare
from fxshare.errors import PlanError, StoreError
from fxshare.plans.units import units_of
from fxshare.result.products import slices_of
from fxshare.sites.mlps import Mlps, mlps
from fxshare.sites.tensors import site_tensors
from tests.compiling.narrowed import (
    FAMILIES,
    GENERATING,
    batches,
    check_backend,
    check_computed_and_counted,
    check_generated,
    check_lowered_saved_and_loaded,
    compiled,
    dense_folder,
    failed_checks,
    model,
    program_of,
    refusal_of,
    sizes_of,
    with_other_kept,
)
from tests.strategies import no_warnings_of_ours

EXPERTS = ("mixtral", "gpt_oss")


def found_in(original: nn.Module, front_end: str) -> tuple[Any, Mlps]:
    stages = prepare(original, fxshare.init(original), batches(), None, front_end)
    graph = stages.captured.graph
    return stages, mlps(graph, stages.sites, side_by_side=stages.captured.side_by_side)


def plan_of(original: nn.Module, kept: float = 0.5, front_end: str = "fx") -> Plan:
    """As one would write it: the first MLP whole, of the others a share of the units; experts have
    names of their own, and fewer units the later they are."""
    stages, found = found_in(original, front_end)
    entries = []
    for at, one in enumerate(found.found):
        expert = one.consumer.slices[0].head or 0
        left = one.units if at == 0 else int(kept * one.units) - expert
        name = one.consumer.name if ".experts." in one.consumer.name else None
        own = {"kept": left, "name": name, "alternating": one.alternating}
        entries.append(units_of(one.producers, one.consumer, **own))
    return Plan(mode="planned", sites=stages.sites, units=tuple(entries))


@functools.cache
def plan_text(family: str) -> str:
    """The plan file of a family."""
    return plan_of(model(family)).to_json()


@functools.cache
def pair(family: str, front_end: str = "fx") -> tuple[nn.Module, Any]:
    """A model, and it compiled with a plan from a file; tests must not change them."""
    original = model(family)
    return original, compiled(original, plan_of(original, front_end=front_end), front_end)


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_it_computes_what_its_weights_multiply_out_to(family: str, front_end: str) -> None:
    original, gm = pair(family, front_end)
    check_computed_and_counted(original, gm)


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_an_mlp_that_keeps_all_its_units_is_what_it_was(family: str) -> None:
    original, gm = pair(family)
    first = gm.fxshare.plan.units[0]
    assert first.kept == first.of
    for site in gm.fxshare.plan.sites:
        if site.name in first.sites:
            place = slices_of(gm)[site.slices[0].name]
            stored = gm.get_submodule(place.module).weight
            assert stored.data_ptr() == site_tensors(original, site)[0].data_ptr()


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_lowered_made_readable_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    check_lowered_saved_and_loaded(*pair(family), tmp_path)


@pytest.mark.parametrize("family", [*GENERATING, *EXPERTS])
def test_it_generates_what_the_multiplied_out_model_does(family: str) -> None:
    check_generated(*pair(family), "dynamic")


def test_dense_weights_are_exported_with_zeros(tmp_path: Path) -> None:
    _, gm = pair("llama")
    weight = dense_folder(gm, tmp_path / "dense").model.layers[1].mlp.down_proj.weight
    assert int((weight.abs().sum(0) > 0).sum()) == 12


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_folder_for_vllm_has_the_units_that_stay_and_no_others(
    family: str, tmp_path: Path
) -> None:
    _, gm = pair(family)
    done = fxshare.export(gm, tmp_path / "m", to="vllm")  # read back and compared, tokens too
    assert done.notes == ()
    stored = sum(t.numel() for t in load_file(tmp_path / "m" / "model.safetensors").values())
    assert stored == sum(p.numel() for p in gm.parameters())
    linears = json.loads((tmp_path / "m" / "config.json").read_text())["shared_linears"]["linears"]
    whole, fewer = gm.fxshare.plan.units
    assert linears[fewer.consumer.split(".", 1)[1]]["in_features"] == fewer.kept  # its own names
    assert family == "gpt2" or whole.consumer.split(".", 1)[1] not in linears


def test_a_program_of_it_is_exported(tmp_path: Path) -> None:
    _, gm = pair("llama")
    program = program_of(gm, tmp_path / "model.pt2")
    shapes = {tuple(p.shape) for p in program.parameters()}
    assert (12, 16) in shapes
    assert (16, 12) in shapes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_our_backend_runs_it(family: str) -> None:
    check_backend(*pair(family))


def broken(gm: Any, change: str) -> Any:
    """A copy in which something about the last MLP is wrong."""
    result = copy.deepcopy(gm)
    one = gm.fxshare.plan.units[-1]
    places = slices_of(result)
    down = result.get_submodule(places[one.consumer].module)
    if change == "bias":
        down.bias.data += 1e-2
        return result
    if change == "weight":
        down.weight.data[:, 0] *= 1.01
        return result
    units = places[one.consumer].unit_columns
    assert units is not None
    other = next(unit for unit in range(units.of) if unit not in units.kept)
    wrong = tuple(sorted({*units.kept[1:], other}))
    with_other_kept(result, one.name, lambda units: wrong)
    return result


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *(("gpt2", change) for change in ("bias", "weight", "index")),
        *((family, "index") for family in EXPERTS),
    ],
)
def test_verify_notices_a_wrong_index_and_stale_tensors(family: str, change: str) -> None:
    original, gm = pair(family)
    failed = failed_checks(original, broken(gm, change))
    assert "bias" in failed if change == "bias" else "weight" in failed


def test_a_folder_with_other_units_than_its_plan_is_refused(tmp_path: Path) -> None:
    from tests.store.test_hostile import change

    _, gm = pair("llama")
    name = gm.fxshare.plan.units[1].name
    for number, text in enumerate(("0-4", "0-10,99", "5,3", "x")):
        folder = tmp_path / str(number)
        fxshare.save(gm, folder)
        change(
            folder, "fxshare.json", lambda one, text=text: one["kept_units"].update({name: text})
        )
        with pytest.raises(StoreError, match=r"keep 12 of 24|runs of units"):
            fxshare.load(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(kept=30), "keeps 30 of 24 units"),
        (lambda e: e.update(kept=0), "greater than or equal to 1"),
        (lambda e: e.update(consumer="nowhere"), "'nowhere' is not a site of the plan"),
        (lambda e: e.update(of=12), "has 12 units, and 'model.layers.1.mlp.down_proj' reads 24"),
        (lambda e: e.update(numbers_per_unit=1), "says 1 numbers per unit, its sites have 48"),
        (lambda e: e.update(producers=[]), "at least 1 item"),
        (lambda e: e.update(surprise=1), "unknown key"),
    ],
)
def test_a_plan_file_with_a_wrong_entry_says_which(change: Any, reason: str) -> None:
    assert reason in refusal_of(plan_text("llama"), change, "units_1")


def test_units_and_bases_do_not_overlap_and_plans_before_them_are_read() -> None:
    original = model("llama")
    plan = plan_of(original)
    plain = json.loads(plan.to_json())
    assert plain["version"] == 2
    name = "model.layers.1.mlp.down_proj"
    group = {"name": "basis", "type": "down", "label": "", "layers": [1], "slices": [name]}
    group |= {"in_features": 24, "out_features": 16, "rank": 3}
    with pytest.raises(PlanError, match="is in group 'basis', and units"):
        Plan.from_json(json.dumps({**plain, "groups": [group]}))
    again = {**plain["units"][1], "name": "again"}
    with pytest.raises(PlanError, match=r"is in units .* and in"):
        Plan.from_json(json.dumps({**plain, "units": [*plain["units"], again]}))
    with pytest.raises(PlanError, match="hidden units are chosen in planned mode only"):
        Plan.from_json(json.dumps({**plain, "mode": "sharing"}))
    del plain["units"]
    old = Plan.from_json(json.dumps({**plain, "version": 1, "groups": [group]}))
    assert not old.units
    assert "units" not in json.loads(old.to_json())


def test_a_group_beside_units_is_carried_out_too() -> None:
    original = model("llama")
    plain = json.loads(plan_of(original).to_json())
    group = {"name": "basis", "type": "q", "label": "", "layers": [0], "rank": 3}
    group |= {"slices": ["model.layers.0.self_attn.q_proj"], "in_features": 16, "out_features": 16}
    plan = Plan.from_json(json.dumps({**plain, "groups": [group]}))
    with no_warnings_of_ours():
        cfg = fxshare.init(original)
        gm = fxshare.compile(original, cfg, calibration=batches(), plan=plan)
    names = [row.name for row in gm.fxshare.report.groups]
    assert {"basis", "units_1"} <= set(names)
    assert fxshare.verify(original, fxshare.lower(gm, prefer="speed")).ok


def test_units_that_the_graph_does_not_show_are_refused_with_the_reason() -> None:
    original = model("llama")
    plan = plan_of(original)
    cfg = fxshare.init(original)
    with pytest.raises(PlanError, match=r"stands in no graph .* leave the entry out"):
        fxshare.compile(original, cfg, calibration=batches(), plan=plan, capture="modules")
    one = plan.units[1]
    sites = {site.name: site for site in plan.sites}
    gate, up = (sites[name] for name in one.producers)
    torn = units_of([gate], sites[one.consumer], kept=3)
    with pytest.raises(PlanError, match=r"reads what .* compute, found the producers"):
        fxshare.compile(
            original,
            cfg,
            calibration=batches(),
            plan=plan.model_copy(update={"units": (torn,)}),
        )
    attention = units_of([sites["model.layers.1.self_attn.q_proj"]], gate, kept=3)
    with pytest.raises(PlanError, match=r"'model.layers.1.mlp.gate_proj' reads what is not"):
        fxshare.compile(
            original,
            cfg,
            calibration=batches(),
            plan=plan.model_copy(update={"units": (attention,)}),
        )
    assert up.out_features == 24


def test_what_stands_in_a_report_tables_and_pictures() -> None:
    from fxshare.cli.plan import plan_text
    from fxshare.cli.why import explain_in_plan
    from fxshare.views.grid import grid_of
    from fxshare.views.picture import plan_figure

    _, gm = pair("phi3")
    plan = gm.fxshare.plan
    row = next(r for r in gm.fxshare.report.groups if r.name == plan.units[1].name)
    assert (row.rank, row.storage, row.numbers_after) == (12, "units", 12 * 48)
    assert "12 units" in str(gm.fxshare.report)
    text = plan_text(plan)
    assert "12 of 24" in text
    assert "2 MLPs with fewer hidden units" in text
    assert "dense: model.layers.1.mlp.down_proj" not in text
    lines = explain_in_plan(plan, "model.layers.1.mlp.down_proj")
    assert any("keeps 12 of 24" in line for line in lines)
    assert "12 of 24 stay" in explain_in_plan(plan, plan.units[1].name)[0]
    kept = {bar.slice: bar.kept for bars in grid_of(plan).cells.values() for bar in bars}
    assert kept["model.layers.1.mlp.down_proj"] == 0.5
    assert plan_figure(plan, title="units") is not None
    assert (12, 16) in sizes_of(plan)
    assert (16, 24) in sizes_of(plan)
