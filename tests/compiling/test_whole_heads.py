"""A plan file from which whole heads go: carried out, checked, saved, generated with, exported."""

from __future__ import annotations

import copy
import functools
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
from fxshare.plans.whole_heads import WholeHeads, whole_heads_of
from fxshare.result.products import slices_of
from fxshare.sites.head_groups import head_groups
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
    refusal_of,
    sizes_of,
    with_other_kept,
)

WIDTH = 8


@functools.cache
def family(name: str) -> nn.Module:
    """Of two heads; the Llama with a key and a value for two of four."""
    if name != "llama":
        return model(name)
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return tf.LlamaForCausalLM(config).eval()


def plan_of(original: nn.Module, front_end: str = "fx") -> Plan:
    """The first attention whole, of the other one of two key-value heads."""
    stages = prepare(original, fxshare.init(original), batches(), None, front_end)
    found = head_groups(stages.captured.graph, stages.sites).found
    entries = [whole_heads_of(one, kept=2 - at) for at, one in enumerate(found)]
    assert [one.of for one in entries] == [2, 2]
    return Plan(mode="planned", sites=stages.sites, units=tuple(entries))


@functools.cache
def pair(name: str, front_end: str = "fx") -> tuple[nn.Module, Any]:
    """A model, and it compiled with a plan from a file; tests must not change them."""
    original = family(name)
    return original, compiled(original, plan_of(original, front_end), front_end)


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_its_weights_multiply_out_to(name: str, front_end: str) -> None:
    original, gm = pair(name, front_end)
    gone = check_computed_and_counted(original, gm)
    assert gone == gm.fxshare.plan.units[-1].numbers_per_unit


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_that_says_less_goes_and_is_made_up_for(name: str) -> None:
    """Less is lost than with that head's columns left out, or with the other head gone."""
    original, gm = pair(name)
    entry = gm.fxshare.plan.units[-1]
    row = gm.fxshare.report.groups[1]
    assert 0 < row.weighted_error < 1
    (kept,) = slices_of(gm)[entry.consumer].unit_columns.kept
    site = next(s for s in gm.fxshare.plan.sites if s.name == entry.consumer)
    wide = site.in_features // 2
    errors = []
    for head in (1 - kept, kept):
        cut = copy.deepcopy(original)
        weight = cut.get_submodule(site.calls[0]).weight
        with torch.no_grad():
            columns = weight if name != "gpt2" else weight.T
            columns[:, head * wide : (head + 1) * wide] = 0
        errors.append(float((outputs(cut) - outputs(original)).square().mean()))
    assert float((outputs(gm) - outputs(original)).square().mean()) < min(errors)


@pytest.mark.parametrize("name", FAMILIES)
def test_lowered_made_readable_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    check_lowered_saved_and_loaded(*pair(name), tmp_path)


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_what_the_multiplied_out_model_does(name: str, cache: str) -> None:
    check_generated(*pair(name), cache)


def test_the_cache_has_fewer_heads_as_the_report_says() -> None:
    _, gm = pair("llama")
    found = gm.generate(
        batches()[0][:1, :4], max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    layers = found.past_key_values.layers
    assert [layer.values.shape[1] for layer in layers] == [2, 1]
    assert [layer.keys.shape[1] for layer in layers] == [2, 1]
    rows = {row.name: row for row in gm.fxshare.report.groups}
    row = rows[gm.fxshare.plan.units[1].name]
    assert (row.cache_bytes_before, row.cache_bytes_after) == (4 * 4 * WIDTH, 4 * 2 * WIDTH)
    assert "fewer heads" in str(gm.fxshare.report)
    with pytest.raises(FxShareError, match=r"'whole_heads_1' with 1 of 2 heads.*use_cache=False"):
        check_width(found.past_key_values, gm.fxshare.plan)
    own = module_form(gm)  # zeros where heads were
    check_width(own(batches()[0][:1, :4]).past_key_values, gm.fxshare.plan)
    torch.testing.assert_close(outputs(own), outputs(gm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_weights_are_exported_with_zeros_and_one_cache_is_refused(
    name: str, tmp_path: Path
) -> None:
    _, gm = pair(name)
    dense_folder(gm, tmp_path / "dense")
    with pytest.raises(ExportError, match=r"one number of heads, and 'whole_heads_1' .* keeps 1"):
        fxshare.export(gm, tmp_path / "genai", to="ort-genai")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("to", ["pt2", "onnx", "vllm", "py"])
def test_programs_and_folders_of_it_are_exported(name: str, to: str, tmp_path: Path) -> None:
    _, gm = pair(name)
    suffix = {"pt2": ".pt2", "onnx": ".onnx", "py": ".py", "vllm": ""}[to]
    fxshare.export(gm, tmp_path / f"model{suffix}", to=to)  # read back and compared


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_torch_compile_runs_it_and_with_our_backend(name: str) -> None:
    check_backend(*pair(name))
    _, gm = pair(name)
    whole = torch.compile(gm, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(whole), outputs(gm), rtol=1e-5, atol=1e-5)


def broken(gm: Any, change: str) -> Any:
    """A copy in which something about the last attention is wrong."""
    result = copy.deepcopy(gm)
    entry = gm.fxshare.plan.units[-1]
    places = slices_of(result)
    read = result.get_submodule(places[entry.consumer].module)
    there = [n for n in entry.own if places[n].unit_rows.size]
    first = result.get_submodule(places[there[0]].module)
    if change == "stale bias":
        first.bias.data[0] += 1e-2
    elif change == "bias":
        read.bias.data += 1e-2
    elif change == "queries":
        first.weight.data[0] *= 1.01
    elif change == "weight":
        read.weight.data[:, 0] *= 1.01
    else:
        with_other_kept(
            result,
            entry.name,
            lambda units: units.kept if units.span else tuple(1 - head for head in units.kept),
        )
    return result


@pytest.mark.parametrize("change", ["stale bias", "bias", "queries", "weight", "index"])
def test_verify_notices_stale_tensors(change: str) -> None:
    original, gm = pair("gpt2")
    failed = failed_checks(original, broken(gm, change))
    assert "bias" in failed if "bias" in change else "weight" in failed or change == "index"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(kept=3), "keeps 3 of 2 heads"),
        (lambda e: e.update(kept=0), "greater than or equal to 1"),
        (lambda e: e.update(consumer="nowhere"), "'nowhere' is not a site of the plan"),
        (lambda e: e.update(heads=5), "has 2 keys and values for 5 queries"),
        (lambda e: e.update(heads=6), "has 6 heads, and 'model.layers.1.self_attn.o_proj' reads"),
        (lambda e: e.update(of=4, kept=3), "has 4 keys and values of 16, of 32 rows"),
        (lambda e: e.update(numbers_per_unit=1), "says 1 numbers per unit, its sites have 1536"),
        (lambda e: e.update(width=7), "has 2 keys and values of 7, of 32 rows"),
        (lambda e: e.update(values=["x"]), "'x' is not a slice of"),
        (lambda e: e.update(values=e["keys"]), "a site or slice is named twice"),
        (lambda e: e.update(bits=8), "what fewer heads leave is stored in the model's dtype"),
        (lambda e: e.update(surprise=1), "unknown key"),
    ],
)
def test_a_plan_file_with_a_wrong_entry_says_which(change: Any, reason: str) -> None:
    assert reason in refusal_of(pair("llama")[1].fxshare.plan.to_json(), change, "whole_heads_1")


def test_heads_that_the_graph_does_not_show_are_refused_with_the_reason() -> None:
    original = family("llama")
    plan, cfg = plan_of(original), fxshare.init(original)
    with pytest.raises(PlanError, match=r"stands in no graph .* leave the entry out"):
        fxshare.compile(original, cfg, calibration=batches(), plan=plan, capture="modules")
    entry = plan.units[1]
    assert isinstance(entry, WholeHeads)
    turned = entry.model_copy(update={"keys": entry.values, "values": entry.keys})
    with pytest.raises(PlanError, match=r"reads 4 heads with 2 keys and values from .*, found 4"):
        fxshare.compile(
            original, cfg, calibration=batches(), plan=plan.model_copy(update={"units": (turned,)})
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
    assert (row.rank, row.storage) == (1, "whole heads")
    text = plan_text(plan)
    assert "1 of 2" in text
    assert "2 attentions with fewer heads" in text
    assert any("keeps 1 of 2" in line for line in explain_in_plan(plan, entry.values[0]))
    assert "heads of" in explain_in_plan(plan, entry.name)[0]
    kept = [bar.kept for bars in grid_of(plan).cells.values() for bar in bars]
    assert min(kept) < 1
    assert plan_figure(plan, title="heads") is not None
    assert (WIDTH, 16) in sizes_of(plan)
    assert (16, 3 * WIDTH) in sizes_of(plan)
