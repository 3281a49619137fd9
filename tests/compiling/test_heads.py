"""A plan file that names heads: carried out, checked, saved, lowered, generated with, exported."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare import Plan
from fxshare.compiling.stages import prepare
from fxshare.errors import ExportError, FxShareError, PlanError
from fxshare.generation.module_form import module_form
from fxshare.generation.narrow_cache import check_width
from fxshare.plans.heads import Heads, heads_of
from fxshare.result.products import slices_of
from fxshare.sites.attention import Attentions, attentions
from fxshare.verifying.multiplied import multiplied_out
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
    outputs,
    program_of,
    refusal_of,
    sizes_of,
    with_other_kept,
)
from tests.strategies import no_warnings_of_ours

KEPT, WIDTH = 5, 8


def found_in(original: nn.Module, front_end: str) -> tuple[Any, Attentions]:
    stages = prepare(original, fxshare.init(original), batches(), None, front_end)
    graph = stages.captured.graph
    return stages, attentions(graph, stages.sites, side_by_side=stages.captured.side_by_side)


def plan_of(original: nn.Module, front_end: str = "fx") -> Plan:
    """The first attention whole, of the other five eighths of the width."""
    stages, found = found_in(original, front_end)
    entries = [
        heads_of(one.values, one.consumer, one.width, kept=(WIDTH, KEPT)[at])
        for at, one in enumerate(found.found)
    ]
    return Plan(mode="planned", sites=stages.sites, units=tuple(entries))


@functools.cache
def plan_text(family: str) -> str:
    """The plan file of a family."""
    return plan_of(model(family)).to_json()


@functools.cache
def pair(family: str, front_end: str = "fx") -> tuple[nn.Module, Any]:
    """A model, and it compiled with a plan from a file; tests must not change them."""
    original = model(family)
    return original, compiled(original, plan_of(original, front_end), front_end)


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_its_weights_multiply_out_to(family: str, front_end: str) -> None:
    original, gm = pair(family, front_end)
    gone = check_computed_and_counted(original, gm)
    assert gone == 3 * gm.fxshare.plan.units[-1].numbers_per_unit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_width_is_made_up_for(family: str) -> None:
    """Of what the output is worth little is lost: less than with rows left out."""
    original, gm = pair(family)
    entry = gm.fxshare.plan.units[-1]
    assert 0 < gm.fxshare.report.groups[1].weighted_error < 1
    cut = multiplied_out(original, gm)
    sites = {site.name: site for site in gm.fxshare.plan.sites}
    weight = cut.get_submodule(sites[entry.consumer].calls[0]).weight
    dense = original.get_submodule(sites[entry.consumer].calls[0]).weight
    heads = (-1, entry.heads, WIDTH) if family != "gpt2" else (entry.heads, WIDTH, -1)
    at = 2 if family != "gpt2" else 1
    with torch.no_grad():
        for one in entry.values:  # the values as they were, and columns left out
            site = gm.fxshare.plan.site_of(one)
            module, was = (m.get_submodule(site.calls[0]) for m in (cut, original))
            module.weight.copy_(was.weight)
            if was.bias is not None:
                module.bias.copy_(was.bias)
        weight.copy_(dense)
        weight.view(heads).narrow(at, KEPT, WIDTH - KEPT).zero_()
    far = (outputs(cut) - outputs(original)).square().mean()
    near = (outputs(gm) - outputs(original)).square().mean()
    assert near < far


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_that_keeps_its_width_is_what_it_was(family: str) -> None:
    original, gm = pair(family)
    first = gm.fxshare.plan.units[0]
    assert first.kept == first.of
    known = dict(original.named_parameters())
    for site in gm.fxshare.plan.sites:
        if site.name == first.consumer:
            place = slices_of(gm)[site.slices[0].name]
            stored = gm.get_submodule(place.module).weight
            assert stored.data_ptr() == known[f"{site.name}.weight"].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_made_readable_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    check_lowered_saved_and_loaded(*pair(family), tmp_path)


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_what_the_multiplied_out_model_does(family: str, cache: str) -> None:
    check_generated(*pair(family), cache)


def test_the_cache_is_narrower_as_the_report_says() -> None:
    _, gm = pair("llama")
    found = gm.generate(
        batches()[0][:1, :4], max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    values = [layer.values.shape for layer in found.past_key_values.layers]
    assert [shape[-1] for shape in values] == [WIDTH, KEPT]
    assert [layer.keys.shape[-1] for layer in found.past_key_values.layers] == [WIDTH, WIDTH]
    rows = {row.name: row for row in gm.fxshare.report.groups}
    entry = gm.fxshare.plan.units[1]
    assert rows[entry.name].cache_bytes_before == 4 * WIDTH
    assert rows[entry.name].cache_bytes_after == 4 * KEPT
    assert "cache" in str(gm.fxshare.report)


def test_dense_weights_are_exported_with_zeros(tmp_path: Path) -> None:
    _, gm = pair("llama")
    weight = dense_folder(gm, tmp_path / "dense").model.layers[1].self_attn.v_proj.weight
    assert int((weight.abs().sum(1) > 0).sum()) == KEPT


def test_a_program_of_it_is_exported(tmp_path: Path) -> None:
    _, gm = pair("llama")
    program = program_of(gm, tmp_path / "model.pt2")
    shapes = {tuple(p.shape) for p in program.parameters()}
    assert {(KEPT, 16), (16, 2 * KEPT)} <= shapes


def test_a_folder_for_vllm_has_zeros_and_a_cache_of_one_width_is_refused(tmp_path: Path) -> None:
    import transformers as tf

    _, gm = pair("llama")
    done = fxshare.export(gm, tmp_path / "vllm", to="vllm")
    gone = sum(one.dense_numbers - one.stored_numbers for one in gm.fxshare.plan.units)
    assert done.notes == (
        f"of full size, with zeros where heads went: heads_1; {4 * gone:,} bytes that the compiled "
        "model does not have",
    )
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "vllm", trust_remote_code=True).eval()
    torch.testing.assert_close(outputs(read), outputs(gm), rtol=1e-5, atol=1e-5)
    assert read.model.layers[1].self_attn.v_proj.weight.shape == (WIDTH, 16)
    with pytest.raises(ExportError, match=r"one width of heads, and 'heads_1' .* keeps 5 of 8"):
        fxshare.export(gm, tmp_path / "genai", to="ort-genai")


def test_values_that_are_narrower_in_a_projection_whose_queries_share_a_basis(
    tmp_path: Path,
) -> None:
    original = model("gpt2")
    plan = plan_of(original)
    site = next(s for s in plan.sites if s.name.endswith("h.1.attn.c_attn"))
    query = site.slices[0]
    group = {
        "name": "basis_q",
        "type": site.type,
        "label": query.label,
        "layers": [1],
        "slices": [query.name],
        "in_features": site.in_features,
        "out_features": query.out_features,
        "rank": 4,
    }
    gm = compiled(original, Plan.model_validate({**plan.model_dump(), "groups": [group]}))
    done = fxshare.export(gm, tmp_path / "m", to="vllm")
    assert done.distance is not None
    assert done.distance.relative <= done.limit
    assert [note[:38] for note in done.notes] == ["of full size, with zeros where heads w"]


def test_own_code_does_not_go_on_with_a_narrower_cache() -> None:
    _, gm = pair("llama")
    ids = batches()[0][:1, :4]
    found = gm.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(FxShareError, match=r"'heads_1' with a width of 5 of 8 .*use_cache=False"):
        check_width(found.past_key_values, gm.fxshare.plan)
    own = module_form(gm)  # zeros where the width ends
    check_width(own(ids).past_key_values, gm.fxshare.plan)
    torch.testing.assert_close(outputs(own), outputs(gm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_our_backend_runs_it(family: str) -> None:
    check_backend(*pair(family))


def broken(gm: Any, change: str) -> Any:
    """A copy in which something about the last attention is wrong."""
    result = copy.deepcopy(gm)
    entry = gm.fxshare.plan.units[-1]
    places = slices_of(result)
    read = result.get_submodule(places[entry.consumer].module)
    value = result.get_submodule(places[entry.values[0]].module)
    if change == "stale bias":
        value.bias.data[0] += 1e-2
    elif change == "bias":
        read.bias.data += 1e-2
    elif change == "values":
        value.weight.data[0] *= 1.01
    elif change == "weight":
        read.weight.data[:, 0] *= 1.01
    else:
        with_other_kept(result, entry.name, lambda units: (0, 1, 2, 3, 6))
        value.weight.data[0] *= 1.01
    return result


@pytest.mark.parametrize("change", ["stale bias", "bias", "values", "weight", "index"])
def test_verify_notices_stale_tensors(change: str) -> None:
    original, gm = pair("gpt2")
    failed = failed_checks(original, broken(gm, change))
    assert "bias" in failed if "bias" in change else "weight" in failed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(kept=9), "keeps a width of 9 of 8"),
        (lambda e: e.update(kept=0), "greater than or equal to 1"),
        (lambda e: e.update(consumer="nowhere"), "'nowhere' is not a site of the plan"),
        (lambda e: e.update(of=4, kept=3), "has 2 heads of 4, and 'model.layers.1.self_attn.o_"),
        (lambda e: e.update(numbers_per_unit=1), "says 1 numbers per unit, its sites have 48"),
        (lambda e: e.update(kv_heads=2), "has 2 heads of 8 for 2, and its values have 8 rows"),
        (lambda e: e.update(values=["x"]), "'x' is not a slice of"),
        (lambda e: e.update(surprise=1), "unknown key"),
    ],
)
def test_a_plan_file_with_a_wrong_entry_says_which(change: Any, reason: str) -> None:
    assert reason in refusal_of(plan_text("llama"), change, "heads_1")


def test_heads_and_bases_do_not_overlap() -> None:
    original = model("phi3")
    plain = json.loads(plan_of(original).to_json())
    site = next(x for x in plain["sites"] if x["name"] == "model.layers.1.self_attn.qkv_proj")
    names = [s["name"] for s in site["slices"]]
    group = {"name": "basis", "type": site["type"], "label": "", "layers": [1], "in_features": 16}
    own = [s for s in site["slices"] if s["part"] == "v"]
    group |= {"slices": [s["name"] for s in own], "out_features": 16, "rank": 3}
    with pytest.raises(PlanError, match="is in group 'basis', and units"):
        Plan.from_json(json.dumps({**plain, "groups": [group]}))
    # queries and keys of the same weight may share a basis
    others = [s for s in site["slices"] if s["part"] != "v"]
    group |= {"slices": [s["name"] for s in others]}
    group |= {"out_features": sum(s["stop"] - s["start"] for s in others)}
    plan = Plan.from_json(json.dumps({**plain, "groups": [group]}))
    with no_warnings_of_ours():
        cfg = fxshare.init(original)
        gm = fxshare.compile(original, cfg, calibration=batches(), plan=plan)
    assert fxshare.verify(original, gm).ok
    assert fxshare.verify(original, fxshare.lower(gm, prefer="speed")).ok
    assert len(names) == len(own) + len(others)


def test_heads_that_the_graph_does_not_show_are_refused_with_the_reason() -> None:
    original = model("llama")
    plan = plan_of(original)
    cfg = fxshare.init(original)
    with pytest.raises(PlanError, match=r"stands in no graph .* leave the entry out"):
        fxshare.compile(original, cfg, calibration=batches(), plan=plan, capture="modules")
    entry = plan.units[1]
    assert isinstance(entry, Heads)
    sites = {site.name: site for site in plan.sites}
    keys = sites["model.layers.1.self_attn.k_proj"]
    wrong = heads_of([(keys, keys.slices[0])], sites[entry.consumer], WIDTH, kept=3)
    with pytest.raises(PlanError, match=r"reads 1 heads of 8 from .*v_proj.*found 1 of 8 from"):
        fxshare.compile(
            original,
            cfg,
            calibration=batches(),
            plan=plan.model_copy(update={"units": (wrong,)}),
        )


def test_what_stands_in_a_report_tables_and_pictures() -> None:
    from fxshare.cli.plan import plan_text
    from fxshare.cli.why import explain_in_plan
    from fxshare.views.grid import grid_of
    from fxshare.views.picture import plan_figure

    _, gm = pair("phi3")
    plan = gm.fxshare.plan
    entry = plan.units[1]
    row = next(r for r in gm.fxshare.report.groups if r.name == entry.name)
    assert (row.rank, row.storage) == (KEPT, "heads")
    assert row.numbers_after == KEPT * entry.numbers_per_unit
    text = plan_text(plan)
    assert "5 of 8" in text
    assert "2 attentions with narrower heads" in text
    lines = explain_in_plan(plan, entry.values[0])
    assert any("keeps 5 of 8" in line for line in lines)
    assert "width of heads of" in explain_in_plan(plan, entry.name)[0]
    kept = {bar.slice: bar.kept for bars in grid_of(plan).cells.values() for bar in bars}
    assert kept[entry.values[0]] == KEPT / WIDTH
    assert plan_figure(plan, title="heads") is not None
    assert (2 * KEPT, 16) in sizes_of(plan)
    assert (16, 32 + 2 * KEPT) in sizes_of(plan)
