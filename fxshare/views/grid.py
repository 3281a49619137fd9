"""A plan as rows and bars: what the picture shows, without drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxshare.plans.plan import Group, Plan
from fxshare.plans.units import Units
from fxshare.sites.site import Site, SliceSpec

MOST_ROWS = 64
"""With more rows than this heads become bars in one row, and then parts do."""

# What is drawn where ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One slice in a cell. ``group`` is None where it is dense."""

    slice: str
    group: str | None
    kept: float


@dataclass(frozen=True)
class Row:
    """A weight type, and which of its slices: ``q.3``, ``q``, or empty."""

    type: str
    label: str


@dataclass(frozen=True)
class Grid:
    """Cells by (row, column); a cell has one bar per slice. ``whole`` is False where rows were
    too many and a cell has the bars of several."""

    layers: tuple[int | None, ...]
    rows: tuple[Row, ...]
    cells: Mapping[tuple[int, int], tuple[Bar, ...]]
    whole: bool


def grid_of(plan: Plan, *, most_rows: int = MOST_ROWS) -> Grid:
    """Where each slice of a plan is drawn, on at most ``most_rows`` rows where types allow it.

    Sites of one type in one layer (experts) have rows of their own, numbered from the second on.
    """
    for detail in ("slice", "part", "site", "type"):
        grid = _grid(plan, detail)
        if len(grid.rows) <= most_rows:
            break
    return grid


def _grid(plan: Plan, detail: str) -> Grid:
    layers: list[int | None] = [*sorted({s.layer for s in plan.sites if s.layer is not None})]
    if any(site.layer is None for site in plan.sites):
        layers.append(None)
    group_of: dict[str, Group | Units] = {
        name: group for group in plan.groups for name in group.slices
    }
    for one in plan.units:
        group_of |= dict.fromkeys(one.slices_among(plan.sites), one)
    cells: dict[tuple[Row, int], list[Bar]] = {}
    for site, number in _numbered(plan.sites):
        for s in site.slices:
            row = _row(site, s, number, detail)
            group = group_of.get(s.name)
            bar = Bar(s.name, group.name if group else None, _kept(group))
            cells.setdefault((row, layers.index(site.layer)), []).append(bar)
    types = list(dict.fromkeys(site.type for site in plan.sites))
    found = dict.fromkeys(row for row, _ in cells)
    rows = tuple(sorted(found, key=lambda row: types.index(row.type)))
    at = {row: number for number, row in enumerate(rows)}
    return Grid(
        tuple(layers),
        rows,
        {(at[row], column): tuple(bars) for (row, column), bars in cells.items()},
        all(len(bars) == 1 for bars in cells.values()),
    )


def _numbered(sites: Sequence[Site]) -> Iterator[tuple[Site, int]]:
    """Sites with their number among those of their type and layer."""
    seen: Counter[tuple[str, int | None]] = Counter()
    for site in sites:
        seen[site.type, site.layer] += 1
        yield site, seen[site.type, site.layer]


def _row(site: Site, s: SliceSpec, number: int, detail: str) -> Row:
    if detail == "type":
        return Row(site.type, "")
    which = {"slice": s.label, "part": s.part, "site": ""}[detail]
    again = f"#{number}" if number > 1 else ""
    return Row(site.type, " ".join(filter(None, (again, which))))


def _kept(group: Group | Units | None) -> float:
    return 1.0 if group is None else group.stored_numbers / group.dense_numbers


__all__ = ["MOST_ROWS", "Bar", "Grid", "Row", "grid_of"]
