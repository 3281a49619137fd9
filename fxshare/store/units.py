"""Which hidden units stay, as text: ``0-3,7``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator

from fxshare.errors import StoreError
from fxshare.plans.plan import Plan
from passes.graph.slices import Slice

_RUNS = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")


def as_unit_runs(text: str) -> str:
    """Runs of ascending numbers."""
    if _RUNS.fullmatch(text) is None:
        raise ValueError(f"expected runs of units, such as 0-3,7; found {text[:40]!r}")
    at = -1
    for low, high in _runs(text):
        if not at < low <= high:
            raise ValueError(f"expected ascending runs of units; found {low}-{high} after {at}")
        at = high
    return text


UnitRuns: TypeAlias = Annotated[str, AfterValidator(as_unit_runs)]


def packed(units: Iterable[int]) -> str:
    """Ascending numbers as runs."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def unpacked(text: str) -> tuple[int, ...]:
    """The numbers of some runs."""
    return tuple(unit for low, high in _runs(text) for unit in range(low, high + 1))


def _runs(text: str) -> list[tuple[int, int]]:
    ends = [run.split("-") for run in text.split(",")]
    return [(int(run[0]), int(run[-1])) for run in ends]


def kept_units(places: Mapping[str, Slice]) -> dict[str, str]:
    """Of a compiled model, by the name of the entry."""
    found = {}
    for place in places.values():
        for units in (place.unit_rows, place.unit_columns):
            if units is not None:
                found[units.name] = packed(units.kept)
    return found


def check_units(folder: Path, plan: Plan, kept: Mapping[str, str]) -> None:
    """Hold the units of a folder to its plan, before any number of them is made.

    Raises :class:`StoreError` naming the MLP.
    """
    for one in plan.units:
        if one.kept == one.of:
            continue
        runs: Sequence[tuple[int, int]] = _runs(kept[one.name]) if one.name in kept else ()
        count = sum(high - low + 1 for low, high in runs)
        if count != one.kept or runs[-1][1] >= one.of:
            raise StoreError(
                f"{folder}: units {one.name!r} of the plan keep {one.kept} of {one.of}; the "
                f"manifest has {kept.get(one.name, 'none')[:60]!r}"
            )


__all__ = ["UnitRuns", "as_unit_runs", "check_units", "kept_units", "packed", "unpacked"]
