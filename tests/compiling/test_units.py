"""A plan file that names hidden units: carried out, checked, saved, lowered, generated with."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from fxshare.compiling.stages import prepare
from fxshare.errors import PlanError, StoreError
from fxshare.plans.units import units_of
from fxshare.result.products import slices_of
from fxshare.sites.mlps import Mlps, mlps
from fxshare.sites.tensors import site_tensors
from fxshare.verifying.multiplied import multiplied_out
from tests.strategies import no_warnings_of_ours
from tests.toys import VOCABULARY


def model(family: str) -> nn.Module:
    """Two layers of a family, with biases that are not zero."""
    import transformers as tf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": VOCABULARY}
    some = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module
        if family == "gpt2":
            small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
            config = tf.GPT2Config(**small, **some, vocab_size=VOCABULARY)
            made = tf.GPT2LMHeadModel(config)
        elif family == "bert":
            made = tf.BertModel(tf.BertConfig(**sizes))
        elif family == "phi3":  # gate and up are one weight
            made = tf.Phi3ForCausalLM(tf.Phi3Config(**sizes, **some, num_key_value_heads=2))
        elif family == "mixtral":  # and the experts of a layer are one, too
            sizes |= {"num_key_value_heads": 1, "num_local_experts": 3}
            made = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **some))
        else:
            made = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **some, num_key_value_heads=1))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim > 1:  # activations far from linear
                nn.init.normal_(parameter, std=0.4)
    return made.eval()


FAMILIES = ("llama", "gpt2", "bert", "phi3", "mixtral")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(4)]


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
        entries.append(units_of(one.producers, one.consumer, kept=left, name=name))
    return Plan(mode="planned", sites=stages.sites, units=tuple(entries))


@functools.cache
def plan_text(family: str) -> str:
    """The plan file of a family."""
    return plan_of(model(family)).to_json()


@functools.cache
def pair(family: str, front_end: str = "fx") -> tuple[nn.Module, Any]:
    """A model, and it compiled with a plan from a file; tests must not change them."""
    original = model(family)
    plan = Plan.from_json(plan_of(original, front_end=front_end).to_json())
    with no_warnings_of_ours():
        gm = fxshare.compile(
            original, fxshare.init(original), calibration=batches(), plan=plan, capture=front_end
        )
    return original, gm


def outputs(module: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = module(batches()[0] if ids is None else ids)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_its_weights_multiply_out_to(family: str, front_end: str) -> None:
    original, gm = pair(family, front_end)
    assert fxshare.verify(original, gm, batches()[:1]).ok
    expected = outputs(multiplied_out(original, gm))
    torch.testing.assert_close(outputs(gm), expected, rtol=1e-5, atol=1e-5)
    assert (outputs(gm) - outputs(original)).abs().max() > 1e-3
    # counted, and nothing else is stored
    plan = gm.fxshare.plan
    gone = plan.dense_numbers - plan.stored_numbers
    assert gm.fxshare.report.numbers_after == plan.stored_numbers
    biases = sum(p.numel() for n, p in original.named_parameters() if n.endswith("bias"))
    left = sum(p.numel() for n, p in gm.named_parameters() if n.endswith("bias"))
    count = sum(p.numel() for p in original.parameters()) - sum(p.numel() for p in gm.parameters())
    assert count == gone + biases - left
    assert gone > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_that_keeps_all_its_units_is_what_it_was(family: str) -> None:
    original, gm = pair(family)
    first = gm.fxshare.plan.units[0]
    assert first.kept == first.of
    for site in gm.fxshare.plan.sites:
        if site.name in first.sites:
            place = slices_of(gm)[site.slices[0].name]
            stored = gm.get_submodule(place.module).weight
            assert stored.data_ptr() == site_tensors(original, site)[0].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_made_readable_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    original, gm = pair(family)
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_it_generates_what_the_multiplied_out_model_does(family: str) -> None:
    original, gm = pair(family)
    ids = batches()[0][:2, :4]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = multiplied_out(original, gm).generate(ids, **options)
    assert torch.equal(gm.generate(ids, **options), expected)
    assert torch.equal(fxshare.lower(gm).generate(ids, **options), expected)


def test_dense_weights_are_exported_with_zeros(tmp_path: Path) -> None:
    import transformers as tf

    _, gm = pair("llama")
    fxshare.export(gm, tmp_path / "dense", to="dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(outputs(dense), outputs(gm), rtol=1e-5, atol=1e-5)
    weight = dense.model.layers[1].mlp.down_proj.weight
    assert int((weight.abs().sum(0) > 0).sum()) == 12


def test_a_program_of_it_is_exported(tmp_path: Path) -> None:
    _, gm = pair("llama")
    fxshare.export(gm, tmp_path / "model.pt2", to="pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    shapes = {tuple(p.shape) for p in program.parameters()}
    assert (12, 16) in shapes
    assert (16, 12) in shapes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_with_our_backend_runs_it(family: str) -> None:
    original, gm = pair(family)
    torch.compiler.reset()
    fast = torch.compile(original, backend=fxshare.backend(gm, inner="eager"))
    torch.testing.assert_close(outputs(fast), outputs(gm), rtol=1e-5, atol=1e-5)


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
    wrong = replace(units, kept=tuple(sorted({*units.kept[1:], other})))
    moved = {}
    for name, place in places.items():
        if place.unit_rows is not None and place.unit_rows.name == one.name:
            place = replace(place, unit_rows=replace(wrong, parts=place.unit_rows.parts))
        if place.unit_columns is not None and place.unit_columns.name == one.name:
            place = replace(place, unit_columns=wrong)
        moved[name] = place
    result.meta["slices"] = moved
    return result


@pytest.mark.parametrize(
    ("family", "change"),
    [*(("gpt2", change) for change in ("bias", "weight", "index")), ("mixtral", "index")],
)
def test_verify_notices_a_wrong_index_and_stale_tensors(family: str, change: str) -> None:
    original, gm = pair(family)
    found = fxshare.verify(original, broken(gm, change), batches()[:1])
    assert not found.ok
    failed = " ".join(check.what for check in found.checks if not check.ok)
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
    plain = json.loads(plan_text("llama"))
    change(plain["units"][1])
    with pytest.raises(PlanError, match=r"unit.*'units_1'.*") as caught:
        Plan.from_json(json.dumps(plain))
    assert reason in str(caught.value)


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
    from fxshare.cost_model.forecast import linears_of
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
    inner = [(one.inner, one.out) for one in linears_of(plan, 1) if hasattr(one, "inner")]
    assert (12, 16) in inner
    assert (16, 24) in inner
