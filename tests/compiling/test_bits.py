"""A plan file that says bits: carried out, checked, saved, lowered, generated with."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare import Plan
from fxshare.base.quantised import BITS, Quantised
from fxshare.errors import CheckFailed, PlanError, RefineError, StoreError
from fxshare.plans.bits import matrix_bytes
from fxshare.store.tensors import tensors_of
from fxshare.verifying.multiplied import multiplied_out
from tests.compiling.narrowed import batches, model, outputs
from tests.strategies import no_warnings_of_ours

CONFIG = {
    "budget": {"params_kept": 0.7},
    "planner": {"search": "off", "kinds": ["basis", "units"]},
}


def in_bits(plan: Plan, bits: int) -> dict[str, Any]:
    """A plan as one would edit it: everything in so many bits."""
    plain: dict[str, Any] = json.loads(plan.to_json())
    for one in (*plain["groups"], *plain.get("units", ())):
        one["bits"] = bits
    dense = [s.name for site in plan.sites for s in site.slices if s.name not in plan.rewritten]
    plain["rounded"] = [{"bits": bits, "slices": dense}] if dense else []
    return plain


@functools.cache
def planned(family: str, kinds: str = "basis, units") -> tuple[nn.Module, Plan]:
    original = model(family)
    config = [fxshare.init(original), CONFIG, {"planner": {"kinds": kinds.split(", ")}}]
    return original, fxshare.plan(original, config, calibration=batches())


@functools.cache
def pair(family: str, bits: int, front_end: str = "fx") -> tuple[nn.Module, Any]:
    """A model, and it compiled with a plan from a file; tests must not change them."""
    # a graph of linears side by side does not show hidden units
    original, plan = planned(family, "basis" if front_end == "modules" else "basis, units")
    plan = Plan.from_json(json.dumps(in_bits(plan, bits)))
    assert plan.version == 3
    with no_warnings_of_ours():
        gm = fxshare.compile(
            original,
            [fxshare.init(original), CONFIG],
            calibration=batches(),
            plan=plan,
            capture=front_end,
        )
    return original, gm


def stored_bytes(gm: nn.Module) -> int:
    """Of the matched weights: all that is quantised, and the kept inputs of bases."""
    codes = sum(p.stored_bytes for p in gm.parameters() if isinstance(p, Quantised))
    kept = [b for n, b in gm.named_buffers() if n.endswith(".kept")]
    return codes + sum(b.nbytes for b in kept)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("family", "front_end"),
    [("llama", "fx"), ("gpt2", "fx"), ("phi3", "fx"), ("bert", "export"), ("gpt2", "modules")],
)
def test_it_computes_what_its_codes_stand_for_and_takes_the_bytes_that_the_plan_says(
    family: str, front_end: str, bits: int
) -> None:
    original, gm = pair(family, bits, front_end)
    assert fxshare.verify(original, gm, batches()[:1]).ok
    expected = outputs(multiplied_out(original, gm))
    torch.testing.assert_close(outputs(gm), expected, rtol=1e-5, atol=1e-5)
    report = gm.fxshare.report
    assert {row.bits for row in report.groups if row.storage != "dense"} == {bits}
    assert sum(row.bytes_after for row in report.groups) == stored_bytes(gm)
    assert report.bytes_kept < 0.7 * bits / 16 + 0.25
    assert "bytes_kept" in str(report)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded_the_codes_are_the_same(family: str, bits: int, tmp_path: Path) -> None:
    original, gm = pair(family, bits)
    for number, one in enumerate((gm, fxshare.lower(gm), fxshare.lower(gm, prefer="speed"))):
        fxshare.save(one, tmp_path / str(number))
        back = fxshare.load(tmp_path / str(number))
        mine, theirs = tensors_of(one), tensors_of(back)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name][1], theirs[name][1]) for name in mine)
        assert any(kind == "codes" for kind, _ in theirs.values())
        assert torch.equal(outputs(back), outputs(one))
        assert fxshare.verify(original, back).ok
        manifest = json.loads((tmp_path / str(number) / "fxshare.json").read_text())
        assert manifest["format_version"] == 2
        size = (tmp_path / str(number) / "model.safetensors").stat().st_size
        rest = sum(p.nbytes for p in one.parameters() if not isinstance(p, Quantised))
        assert size < stored_bytes(one) + rest + 12_000  # names and shapes of the tensors
    assert fxshare.verify(original, fxshare.readable(fxshare.lower(gm))).ok


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_generates_what_the_multiplied_out_model_does(family: str) -> None:
    original, gm = pair(family, 8)
    ids = batches()[0][:2, :4]
    expected = multiplied_out(original, gm).generate(ids, max_new_tokens=5, do_sample=False)
    for one in (gm, fxshare.lower(gm)):
        assert torch.equal(one.generate(ids, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("what", ["scale", "codes"])
def test_a_swapped_scale_and_wrong_codes_are_caught(what: str) -> None:
    original, gm = pair("gpt2", 8)
    name, weight = next(
        (n, p)
        for n, p in gm.named_parameters()
        if isinstance(p, Quantised) and not torch.equal(p.scale[0], p.scale[1])
    )
    part = weight.scale if what == "scale" else weight.stored
    before = part.clone()
    try:
        part[[0, 1]] = part[[1, 0]]
        with pytest.raises(CheckFailed, match="relative error of each slice's weight"):
            fxshare.verify(original, gm, strict=True)
    finally:
        part.copy_(before)
    assert fxshare.verify(original, gm).ok, name


def test_a_plan_without_bits_says_nothing_of_them_and_all_bits_come_back() -> None:
    _, plan = planned("gpt2")
    assert "bits" not in plan.to_json()
    assert "rounded" not in plan.to_json()
    again = Plan.from_json(json.dumps(in_bits(plan, 4)))
    assert Plan.from_json(again.to_json()) == again


def test_why_says_the_bits_of_groups_units_and_dense_slices() -> None:
    from fxshare.cli.why import explain_in_plan

    plan = Plan.from_json(json.dumps(in_bits(planned("gpt2")[1], 4)))
    assert plan.rounded
    assert plan.groups
    text = " ".join(explain_in_plan(plan, plan.rounded[0].slices[0]))
    assert "dense, in no group: its own weight rows in 4 bits" in text
    assert "keeps its original" not in text
    for name in (plan.groups[0].name, *(one.name for one in plan.units)):
        assert ", 4 bits" in " ".join(explain_in_plan(plan, name))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda p: p["groups"][0].update(bits=3), "bits: Input should be 8 or 4; found 3"),
        (
            lambda p: p.update(rounded=[{"bits": 8, "slices": [p["groups"][0]["slices"][0]]}]),
            "is in a group or an MLP that is made smaller; give that the bits",
        ),
        (
            lambda p: p.update(rounded=[{"bits": 8, "slices": ["nowhere"]}]),
            "rounded: 'nowhere' is not a slice of any site",
        ),
        (
            lambda p: p.update(rounded=p["rounded"] * 2),
            "is named twice",
        ),
        (
            lambda p: p.update(mode="exact", groups=[], units=[]),
            "mode 'exact': weights are rounded in planned mode only",
        ),
    ],
)
def test_a_plan_with_wrong_bits_is_refused(edit: Any, reason: str) -> None:
    plain = in_bits(planned("gpt2")[1], 8)
    edit(plain)
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(json.dumps(plain))


def test_codes_are_not_refined_and_a_folder_with_other_codes_is_refused(tmp_path: Path) -> None:
    original, gm = pair("gpt2", 8)
    with pytest.raises(RefineError, match="refine before quantising"):
        fxshare.refine(gm, original, batches(), steps=1)
    fxshare.save(gm, tmp_path / "eight")
    plan = json.loads((tmp_path / "eight" / "plan.json").read_text())
    assert all(group["bits"] == 8 for group in plan["groups"])
    text = (tmp_path / "eight" / "plan.json").read_text().replace('"bits": 8', '"bits": 4')
    (tmp_path / "eight" / "plan.json").write_text(text)
    with pytest.raises(StoreError, match="was altered"):
        fxshare.load(tmp_path / "eight")


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("shape", [(7, 33), (3, 64), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_paper_are_those_of_the_tensors(
    bits: int | None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    found = matrix_bytes(bits, *shape, dtype.itemsize)
    if bits is None:
        assert found == torch.empty(shape, dtype=dtype).nbytes
    else:
        empty = Quantised.empty(*shape, bits, dtype, torch.device("cpu"))
        assert found == empty.stored_bytes


@pytest.mark.parametrize("bits", BITS)
def test_half_precision_is_verified_in_float32(bits: int) -> None:
    original = model("llama").to(torch.bfloat16)
    config = {
        "budget": {"bytes_kept": 0.1 + 0.02 * bits},
        "planner": {"search": "off", "bits": [bits]},
    }
    gm = fxshare.compile(original, [fxshare.init(original), config], calibration=batches())
    result = fxshare.verify(original, gm)
    assert result.ok
    assert result.dtype == "float32"
    assert any(row.rank is not None for row in gm.fxshare.report.groups)
    fast = fxshare.lower(gm, prefer="speed")
    assert fxshare.verify(original, fast).ok
    assert stored_bytes(fast) == stored_bytes(gm)
    assert sum(row.bytes_after for row in gm.fxshare.report.groups) == stored_bytes(gm)
