"""A plan file that names queries and keys: carried out, checked, saved, lowered, generated with."""

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
from fxshare.plans.heads import heads_of
from fxshare.plans.keys import Keys, keys_of
from fxshare.result.products import slices_of
from fxshare.sites.attention import attentions
from fxshare.sites.scores import AllScores, all_scores
from fxshare.verifying.multiplied import multiplied_out
from tests.compiling.narrowed import (
    FAMILIES,
    GENERATING,
    batches,
    biases_of,
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

KEPT, WIDTH = 4, 8


def found_in(original: nn.Module, front_end: str) -> tuple[Any, AllScores]:
    stages = prepare(original, fxshare.init(original), batches(), None, front_end)
    graph = stages.captured.graph
    return stages, all_scores(graph, stages.sites, side_by_side=stages.captured.side_by_side)


def plan_of(original: nn.Module, front_end: str = "fx", *, heads: bool = False) -> Plan:
    """The queries and keys of the first attention whole, of the other half of the width."""
    stages, found = found_in(original, front_end)
    entries: list[Any] = [
        keys_of(one, kept=(WIDTH, KEPT)[at]) for at, one in enumerate(found.found)
    ]
    if heads:
        values = attentions(stages.captured.graph, stages.sites).found
        entries += [heads_of(x.values, x.consumer, x.width, kept=5) for x in values]
    return Plan(mode="planned", sites=stages.sites, units=tuple(entries))


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
    entries = gm.fxshare.plan.units
    assert gone == (WIDTH - KEPT) * entries[-1].numbers_per_unit
    turns = family not in ("gpt2", "bert")
    assert {one.rotary for one in entries} == {"halves" if turns else "none"}
    assert (biases_of(gm) < biases_of(original)) != turns


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_that_keeps_its_width_is_what_it_was(family: str) -> None:
    original, gm = pair(family)
    first = gm.fxshare.plan.units[0]
    assert first.kept == first.of
    known = dict(original.named_parameters())
    for name in (*first.queries, *first.keys):
        stored = gm.get_submodule(slices_of(gm)[name].module).weight
        site = gm.fxshare.plan.site_of(name)
        own = known[f"{site.name}.weight"]
        whole = own.T if family == "gpt2" else own
        s = next(s for s in site.slices if s.name == name)
        assert torch.equal(stored, whole[s.start : s.stop])


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_made_readable_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    check_lowered_saved_and_loaded(*pair(family), tmp_path)


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_what_the_multiplied_out_model_does(family: str, cache: str) -> None:
    check_generated(*pair(family), cache)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_values_may_be_narrower_as_well(family: str) -> None:
    original = model(family)
    plan = plan_of(original, heads=True)
    with no_warnings_of_ours():
        cfg = fxshare.init(original)
        gm = fxshare.compile(original, cfg, calibration=batches(), plan=plan)
    assert fxshare.verify(original, gm, batches()[:1]).ok
    expected = multiplied_out(original, gm)
    torch.testing.assert_close(outputs(gm), outputs(expected), rtol=1e-5, atol=1e-5)
    ids = batches()[0][:1, :4]
    found = gm.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.generate(ids, max_new_tokens=3, do_sample=False))
    layers = found.past_key_values.layers
    assert [x.keys.shape[-1] for x in layers] == [WIDTH, KEPT]
    assert [x.values.shape[-1] for x in layers] == [5, 5]


def test_the_cache_is_narrower_as_the_report_says() -> None:
    _, gm = pair("llama")
    rows = {row.name: row for row in gm.fxshare.report.groups}
    entry = gm.fxshare.plan.units[1]
    assert rows[entry.name].cache_bytes_before == 4 * WIDTH
    assert rows[entry.name].cache_bytes_after == 4 * KEPT
    assert "key-value cache: 64 → 48 bytes per token" in str(gm.fxshare.report)
    ids = batches()[0][:1, :4]
    found = gm.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(FxShareError, match=r"keys of 'keys_1' with a width of 4 of 8"):
        check_width(found.past_key_values, gm.fxshare.plan)
    own = module_form(gm)  # zeros in the place of what goes
    check_width(own(ids).past_key_values, gm.fxshare.plan)
    torch.testing.assert_close(outputs(own), outputs(gm), rtol=1e-5, atol=1e-5)


def test_dense_weights_are_exported_with_zeros_and_a_cache_of_one_width_is_refused(
    tmp_path: Path,
) -> None:
    _, gm = pair("llama")
    weight = dense_folder(gm, tmp_path / "dense").model.layers[1].self_attn.k_proj.weight
    assert int((weight.abs().sum(1) > 0).sum()) == KEPT
    with pytest.raises(ExportError, match=r"one width of heads, and 'keys_1' .* keeps 4 of 8"):
        fxshare.export(gm, tmp_path / "genai", to="ort-genai")


def test_a_program_of_it_is_exported(tmp_path: Path) -> None:
    _, gm = pair("llama")
    program = program_of(gm, tmp_path / "model.pt2")
    shapes = {tuple(p.shape) for p in program.parameters()}
    assert {(KEPT, 16), (2 * KEPT, 16)} <= shapes
    ids = batches()[0]
    found = program(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(found, outputs(gm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_our_backend_runs_it(family: str) -> None:
    check_backend(*pair(family))


def broken(gm: Any, change: str) -> Any:
    """A copy in which something about the last attention is wrong."""
    result = copy.deepcopy(gm)
    entry = gm.fxshare.plan.units[-1]
    places = slices_of(result)
    query = result.get_submodule(places[entry.queries[0]].module)
    key = result.get_submodule(places[entry.keys[0]].module)
    if change == "stale bias":
        key.bias.data[0] += 1e-2
    elif change == "query bias":
        query.bias.data[0] += 1e-2
    elif change == "keys":
        key.weight.data[0] *= 1.01
    elif change == "queries":
        query.weight.data[0] *= 1.01
    else:  # a pair in the place of another
        own = places[entry.queries[0]].unit_rows
        wrong = tuple(n for n in range(WIDTH) if n not in own.kept)
        with_other_kept(result, entry.name, lambda units: wrong)
    return result


@pytest.mark.parametrize("change", ["stale bias", "query bias", "keys", "queries"])
def test_verify_notices_stale_tensors(change: str) -> None:
    original, gm = pair("gpt2")
    failed = failed_checks(original, broken(gm, change))
    assert "bias" in failed if "bias" in change else "weight" in failed


def test_verify_notices_a_wrong_pair() -> None:
    original, gm = pair("llama")
    assert not fxshare.verify(original, broken(gm, "pair"), batches()[:1]).ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(kept=9), "keeps a width of 9 of 8"),
        (lambda e: e.update(kept=3), "keeps 3 of 8, of which 8 are turned in pairs"),
        (lambda e: e.update(rotated=10), "turns 10 numbers of heads of 8"),
        (lambda e: e.update(bits=8), "has bits 8; what narrower keys leave"),
        (lambda e: e.update(consumer="nowhere"), "'nowhere' is not a site of the plan"),
        (lambda e: e.update(numbers_per_unit=1), "says 1 numbers per unit, its sites have 48"),
        (lambda e: e.update(heads=4), "has 4 heads of 8, and ['model.layers.1.self_attn.q_proj']"),
        (lambda e: e.update(keys=["x"]), "'x' is not a slice of"),
        (lambda e: e.update(keys=e["queries"]), "a slice is named twice"),
        (lambda e: e.update(surprise=1), "unknown key"),
    ],
)
def test_a_plan_file_with_a_wrong_entry_says_which(change: Any, reason: str) -> None:
    assert reason in refusal_of(pair("llama")[1].fxshare.plan.to_json(), change, "keys_1")


def test_keys_that_the_graph_does_not_show_are_refused_with_the_reason() -> None:
    original = model("llama")
    plan = plan_of(original)
    cfg = fxshare.init(original)
    with pytest.raises(PlanError, match=r"stands in no graph .* leave the entry out"):
        fxshare.compile(original, cfg, calibration=batches(), plan=plan, capture="modules")
    entry = plan.units[1]
    assert isinstance(entry, Keys)
    wrong = entry.model_copy(update={"rotary": "neighbours"})
    with pytest.raises(PlanError, match=r"8 numbers are turned \(halves\); found .*neighbours"):
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

    _, gm = pair("llama")
    plan = gm.fxshare.plan
    entry = plan.units[1]
    row = next(r for r in gm.fxshare.report.groups if r.name == entry.name)
    assert (row.rank, row.storage) == (KEPT, "keys")
    assert row.numbers_after == KEPT * entry.numbers_per_unit
    text = plan_text(plan)
    assert "4 of 8" in text
    assert "2 attentions with narrower queries and keys" in text
    lines = explain_in_plan(plan, entry.keys[0])
    assert any("keeps 4 of 8" in line for line in lines)
    kept = {bar.slice: bar.kept for bars in grid_of(plan).cells.values() for bar in bars}
    assert kept[entry.queries[0]] == kept[entry.keys[0]] == KEPT / WIDTH
    assert plan_figure(plan, title="keys") is not None
    assert {(16, 2 * KEPT), (16, KEPT)} <= sizes_of(plan)


@pytest.mark.parametrize("kind", ["heads", "units"])
def test_an_entry_of_another_kind_of_ours_is_refused(kind: str) -> None:
    original = model("llama")
    plain = json.loads(plan_of(original).to_json())
    plain["units"][1]["kind"] = kind
    plan = Plan.from_json(json.dumps(plain))
    with pytest.raises(PlanError, match=f"are of kind {kind!r}, and the entry is one of 'keys'"):
        fxshare.compile(original, fxshare.init(original), calibration=batches(), plan=plan)
