"""Codes stand for the rows that they are to stand for: as they are made, and as ``verify`` sees it.

``verify`` holds a slice to the error that was recorded when it was made. Codes that change after
that are noticed; of codes that were made wrongly the record says the same, so that those are held
to the dense rows here, by what rounding alone explains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from fxshare.base.quantised import BITS, GROUP, Quantised
from fxshare.factors import rounding
from fxshare.result.products import slices_of
from fxshare.sites.tensors import site_tensors
from tests.compiling.narrowed import batches
from tests.compiling.test_bits import CONFIG, in_bits, pair, planned
from tests.strategies import no_warnings_of_ours

SHARES = {8: [1.0], 4: [1.0, 0.95, 0.9, 7 / 8, 0.85, 0.8, 0.75, 0.7]}
HIGHEST = {8: 127, 4: 7}


def kept_of(gm: Any, site: str) -> tuple[int, ...] | None:
    """The units of a producer that the result says stay; None of another site."""
    for entry in gm.fxshare.plan.units:
        if site in entry.producers:
            consumer = slices_of(gm)[entry.consumer]
            every = tuple(range(entry.of))
            return every if consumer.unit_columns is None else consumer.unit_columns.kept
    return None


def coded(original: nn.Module, gm: Any) -> Iterator[tuple[str, Quantised, Tensor]]:
    """Of every slice whose codes are of rows of the model: its kind, they, and those rows."""
    plan = gm.fxshare.plan
    for site in plan.sites:
        weight_OI = site_tensors(original, site)[0].detach().double()
        kept = kept_of(gm, site.name)
        for s in site.slices:
            place = slices_of(gm)[s.name]
            stored = gm.get_submodule(place.module).weight[place.start : place.stop]
            rows_OI = weight_OI[s.start : s.stop]
            if kept is not None:
                yield "producer", stored, rows_OI[list(kept)]
            elif s.name in plan.dense_bits:
                yield "rounded", stored, rows_OI


def is_explained(codes: Quantised, rows_OI: Tensor) -> bool:
    """Whether rounding explains all: each scale is one of those that are tried for the largest
    number, to the precision it is stored in, and a row is a step off at most, in the root of the
    mean square. The nearest codes are half a step off; feedback adds to that."""
    eps = torch.finfo(codes.scale.dtype).eps
    scale_OG = codes.scale.double()
    shares = torch.tensor(SHARES[codes.bits], dtype=torch.float64)
    for at, part_OI in enumerate(rows_OI.split(rows_OI.shape[1] if codes.bits == 8 else GROUP, 1)):
        tried = part_OI.abs().amax(1, keepdim=True) / HIGHEST[codes.bits] * shares
        off = (scale_OG[:, at, None] / tried - 1).abs().amin(1)
        if not bool((off <= eps).all()):
            return False
    gap_OI = codes.values(torch.float64) - rows_OI
    return bool((gap_OI.square().mean(1).sqrt() <= scale_OG.amax(1)).all())


def unexplained(original: nn.Module, gm: Any) -> set[str]:
    """The kinds that have codes which rounding does not explain."""
    return {kind for kind, codes, rows in coded(original, gm) if not is_explained(codes, rows)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_codes_are_what_rounding_makes_of_the_rows_that_stay(family: str, bits: int) -> None:
    original, gm = pair(family, bits)
    assert {kind for kind, _, _ in coded(original, gm)} == {"producer", "rounded"}
    assert any(one.kept < one.of for one in gm.fxshare.plan.units)
    assert not unexplained(original, gm)


def swapped(tensor: Tensor) -> Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


MADE_WRONGLY: dict[str, Callable[[Any, Tensor], Quantised]] = {
    "two rows swapped": lambda make, rows: make(swapped(rows)),
    "rows of others": lambda make, rows: make(rows.roll(1, 0)),
    "a swapped scale": lambda make, rows: (codes := make(rows)).with_parts(
        codes.stored, swapped(codes.scale)
    ),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fault", MADE_WRONGLY)
def test_codes_that_are_made_wrongly_are_not_explained(
    fault: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, plan = planned("llama")

    def wrongly(right: Any) -> Any:
        return lambda rows, *rest: MADE_WRONGLY[fault](lambda moved: right(moved, *rest), rows)

    for name in ("nearest", "with_feedback"):
        monkeypatch.setattr(rounding, name, wrongly(getattr(rounding, name)))
    plan = Plan.from_json(json.dumps(in_bits(plan, bits)))
    with no_warnings_of_ours():
        config = [fxshare.init(original), CONFIG]
        gm = fxshare.compile(original, config, calibration=batches(), plan=plan)
    assert unexplained(original, gm) == {"producer", "rounded"}


def slice_of(gm: Any, kind: str) -> str:
    plan = gm.fxshare.plan
    entry = next(one for one in plan.units if one.kept < one.of)
    names = {
        "producer": entry.producers[0],
        "consumer": entry.consumer,
        "rounded": next(iter(plan.dense_bits)),
        "group": plan.groups[0].slices[0],
    }
    return names[kind]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("what", ["rows", "scale", "codes"])
@pytest.mark.parametrize("kind", ["producer", "consumer", "rounded", "group"])
def test_verify_notices_two_rows_that_change_places(kind: str, what: str, bits: int) -> None:
    original, gm = pair("llama", bits)
    name = slice_of(gm, kind)
    weight = gm.get_submodule(slices_of(gm)[name].module).weight
    assert isinstance(weight, Quantised)
    parts = {"rows": (weight.stored, weight.scale), "scale": (weight.scale,)}
    before = [(part, part.clone()) for part in parts.get(what, (weight.stored,))]
    try:
        for part, old in before:
            part.copy_(swapped(old))
        failed = [check for check in fxshare.verify(original, gm).checks if not check.ok]
    finally:
        for part, old in before:
            part.copy_(old)
    assert [check.what for check in failed] == ["relative error of each slice's weight"]
    assert failed[0].distance.where == f"slice {name}"
    assert fxshare.verify(original, gm).ok


@pytest.mark.parametrize("bits", BITS)
def test_verify_notices_rows_of_other_units(bits: int) -> None:
    original, gm = pair("llama", bits)
    name = slice_of(gm, "producer")
    weight, kept = gm.get_submodule(slices_of(gm)[name].module).weight, kept_of(gm, name)
    site = next(site for site in gm.fxshare.plan.sites if site.name == name)
    assert kept is not None
    dense_OI = site_tensors(original, site)[0].detach()
    gone = next(unit for unit in range(len(dense_OI)) if unit not in kept)
    other = rounding.nearest(dense_OI[[gone]], bits, dense_OI.dtype)
    before = weight.stored[0].clone(), weight.scale[0].clone()
    try:
        weight.stored[0], weight.scale[0] = other.stored[0], other.scale[0]
        failed = [check for check in fxshare.verify(original, gm).checks if not check.ok]
    finally:
        weight.stored[0], weight.scale[0] = before
    assert [check.distance.where for check in failed] == [f"slice {name}"]
    assert fxshare.verify(original, gm).ok
