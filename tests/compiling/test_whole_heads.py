"""A plan file from which whole heads go: carried out, checked, saved, generated with, exported."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
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
from fxshare.verifying.multiplied import multiplied_out
from tests.compiling.test_units import batches, model, outputs
from tests.strategies import no_warnings_of_ours

WIDTH = 8
FAMILIES = ("llama", "gpt2", "bert", "phi3")


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
    plan = Plan.from_json(plan_of(original, front_end).to_json())
    with no_warnings_of_ours():
        gm = fxshare.compile(
            original, fxshare.init(original), calibration=batches(), plan=plan, capture=front_end
        )
    return original, gm


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_its_weights_multiply_out_to(name: str, front_end: str) -> None:
    original, gm = pair(name, front_end)
    assert fxshare.verify(original, gm, batches()[:1]).ok
    expected = outputs(multiplied_out(original, gm))
    torch.testing.assert_close(outputs(gm), expected, rtol=1e-5, atol=1e-5)
    assert (outputs(gm) - outputs(original)).abs().max() > 1e-3
    plan = gm.fxshare.plan
    last = plan.units[-1]
    assert gm.fxshare.report.numbers_after == plan.stored_numbers
    assert plan.dense_numbers - plan.stored_numbers == last.numbers_per_unit
    biases = sum(p.numel() for n, p in original.named_parameters() if n.endswith("bias"))
    left = sum(p.numel() for n, p in gm.named_parameters() if n.endswith("bias"))
    count = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in gm.parameters())
    assert count == last.numbers_per_unit + biases - left


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
    original, gm = pair(name)
    lowered = fxshare.lower(gm, prefer="speed")
    for number, one in enumerate((gm, lowered)):
        fxshare.save(one, tmp_path / str(number))
        back = fxshare.load(tmp_path / str(number))
        mine, theirs = one.state_dict(), back.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert torch.equal(outputs(back), outputs(one))
        assert slices_of(back) == slices_of(one)
        assert fxshare.verify(original, back).ok
    assert fxshare.verify(original, fxshare.readable(lowered)).ok
    torch.testing.assert_close(outputs(lowered), outputs(gm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_what_the_multiplied_out_model_does(name: str, cache: str) -> None:
    original, gm = pair(name)
    ids = batches()[0][:2, :4]
    options = {"max_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = multiplied_out(original, gm).generate(ids, **options)
    with no_warnings_of_ours():  # no step falls back to the model's own code
        assert torch.equal(gm.generate(ids, **options), expected)
        assert torch.equal(fxshare.lower(gm).generate(ids, **options), expected)


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
    import transformers as tf

    _, gm = pair(name)
    fxshare.export(gm, tmp_path / "dense", to="dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(outputs(dense), outputs(gm), rtol=1e-5, atol=1e-5)
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
    original, gm = pair(name)
    torch.compiler.reset()
    fast = torch.compile(original, backend=fxshare.backend(gm, inner="eager"))
    torch.testing.assert_close(outputs(fast), outputs(gm), rtol=1e-5, atol=1e-5)
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
        moved = {}
        for name, place in places.items():
            for which in ("unit_rows", "unit_columns"):
                units = getattr(place, which)
                if units is not None and units.name == entry.name and units.span is None:
                    other = tuple(1 - head for head in units.kept)
                    place = replace(place, **{which: replace(units, kept=other)})
            moved[name] = place
        result.meta["slices"] = moved
    return result


@pytest.mark.parametrize("change", ["stale bias", "bias", "queries", "weight", "index"])
def test_verify_notices_stale_tensors(change: str) -> None:
    original, gm = pair("gpt2")
    found = fxshare.verify(original, broken(gm, change), batches()[:1])
    assert not found.ok
    failed = " ".join(check.what for check in found.checks if not check.ok)
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
    plain = json.loads(pair("llama")[1].fxshare.plan.to_json())
    change(plain["units"][1])
    with pytest.raises(PlanError, match=r"unit.*'whole_heads_1'.*") as caught:
        Plan.from_json(json.dumps(plain))
    assert reason in str(caught.value)


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
    from fxshare.cost_model.forecast import linears_of
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
    inner = [(one.inner, one.out) for one in linears_of(plan, 1) if hasattr(one, "inner")]
    assert (WIDTH, 16) in inner
    assert (16, 3 * WIDTH) in inner
