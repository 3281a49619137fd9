"""Pictures of a plan, and of what a budget buys, by matplotlib (the ``viz`` extra).

A plan is drawn as a grid: layers are columns, weight types and their parts and heads rows. All
lengths are inches, y runs downwards. Pictures of equal plans are equal byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.errors import ConfigError
from fxshare.plans.plan import Plan
from fxshare.views.figure import (
    ALONE,
    AVERAGE,
    DENSE,
    HATCH,
    INK,
    PALETTE,
    check_drawable,
    colours,
    mixed,
    own_settings,
    text_width,
    write_drawing,
)
from fxshare.views.grid import Bar, Grid, grid_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAP, _TYPE_GAP = 0.05, 0.13


def draw_plan(plan: Plan, path: Path, *, title: str = "") -> None:
    """Draw a plan into an ``.svg``, ``.png`` or ``.pdf`` file, whole or not at all."""
    check_drawable(path)
    with own_settings():
        write_drawing(plan_figure(plan, title=title), path)


# The plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Sizes and places in inches."""

    width: float
    height: float
    x: tuple[float, ...]
    """Left edges of the columns."""
    y: tuple[float, ...]
    """Upper edges of the rows."""
    cell_width: float
    cell_height: float
    labels: float
    """Left edge of the rows' labels, beside the types'."""
    head: float
    """Base line of the numbers of the layers."""


def _layout(grid: Grid, lines: int) -> _Layout:
    columns, rows = len(grid.layers), len(grid.rows)
    cell_width = min(max(10.0 / columns - _GAP, 0.25), 0.6)
    cell_height = 0.5 if not grid.whole else min(max(6.5 / rows - _GAP, 0.15), 0.36)
    types = max(text_width(row.type, 8, bold=True) for row in grid.rows)
    labels = max(text_width(row.label, 7) for row in grid.rows)
    left = max(0.05 + types + (labels + 0.1 if labels else 0.0) + 0.12, 0.55)
    x = tuple(left + column * (cell_width + _GAP) for column in range(columns))
    head = 0.2 * lines + 0.28
    y, top = [], head + 0.08
    for number, row in enumerate(grid.rows):
        if number and row.type != grid.rows[number - 1].type:
            top += _TYPE_GAP
        y.append(top)
        top += cell_height + _GAP
    width = max(x[-1] + cell_width + 0.05, 6.4)
    return _Layout(width, top, x, tuple(y), cell_width, cell_height, 0.05 + types + 0.1, head)


def plan_figure(plan: Plan, *, title: str = "") -> Figure:
    """The picture of a plan as a matplotlib figure; no global state of matplotlib is touched."""
    from matplotlib.figure import Figure

    if not plan.sites:
        raise ConfigError("there is nothing to draw: the plan has no sites")
    grid = grid_of(plan)
    titles = [title or f"{plan.mode} plan", *_totals(plan)]
    wide = _layout(grid, 0).width
    lines = [
        (part, number == 0)
        for number, line in enumerate(titles)
        for part in _wrapped(line, 8.5, wide - 0.1, bold=number == 0)
    ]
    place = _layout(grid, len(lines))
    chosen = colours(grid)
    legend = _legend(grid, plan, chosen, place)
    height = place.height + 0.2 + 0.3 * (1 + max(row for row, *_ in legend))
    figure = Figure(figsize=(place.width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, place.width)
    axes.set_ylim(height, 0)
    for number, (line, bold) in enumerate(lines):
        weight = "bold" if bold else "normal"
        axes.text(0.05, 0.2 * number + 0.12, line, fontsize=8.5, weight=weight, va="center")
    _draw_labels(axes, grid, place)
    _draw_cells(axes, grid, place, chosen)
    _draw_legend(axes, legend, place)
    return figure


def _wrapped(text: str, size: float, width: float, *, bold: bool) -> list[str]:
    lines: list[str] = []
    words = text.split(" ")
    while words:
        fits, most = 1, len(words)
        number = most  # mostly all of them; else halved, since a width takes a while to find
        while fits < most:
            if text_width(" ".join(words[:number]), size, bold=bold) <= width:
                fits = number
            else:
                most = number - 1
            number = (fits + most + 1) // 2
        lines.append(" ".join(words[:fits]))
        words = words[fits:]
    return lines


def _totals(plan: Plan) -> list[str]:
    shared = sum(len(group.slices) > 1 for group in plan.groups)
    dense = sum(len(site.slices) for site in plan.sites) - len(plan.rewritten)
    units = "".join(f", {count} {what}" for what, count in plan.others.items())
    parts = [
        f"{len(plan.groups)} bases, {shared} of them shared{units}",
        f"{dense} slices dense",
    ]
    if plan.skipped:
        parts.append(f"{len(plan.skipped)} modules not rewritten")
    lines = [
        f"params kept {plan.params_kept:.3f}: {plan.dense_numbers:,} weights → "
        f"{plan.stored_numbers:,} stored numbers; " + ", ".join(parts)
    ]
    if plan.outlook is not None:
        o = plan.outlook
        measured = "" if o.measured is None else f", measured {o.measured:.4g}"
        lines.append(f"predicted loss increase {o.predicted:.4g} per token{measured}")
    return lines


def _draw_labels(axes: Axes, grid: Grid, place: _Layout) -> None:
    middle = place.cell_width / 2
    step = max(1, round(0.3 / (place.cell_width + _GAP)))
    for column, layer in enumerate(grid.layers):
        text = "–" if layer is None else str(layer)
        if column % step == 0:
            axes.text(place.x[column] + middle, place.head, text, fontsize=7, ha="center")
    axes.text(place.x[0] - 0.12, place.head, "layer", fontsize=7, ha="right", color="#666666")
    for number, row in enumerate(grid.rows):
        y = place.y[number] + place.cell_height / 2
        if number == 0 or row.type != grid.rows[number - 1].type:
            axes.text(0.05, y, row.type, fontsize=8, weight="bold", va="center")
        axes.text(place.labels, y, row.label, fontsize=7, va="center")


@dataclass(frozen=True)
class _Run:
    """Neighbouring cells of one row in one group: drawn as one."""

    group: str | None
    row: int
    first: int
    last: int
    kept: float


def _runs(grid: Grid, row: int) -> list[_Run]:
    """The runs of a row whose cells have one bar each."""
    runs: list[_Run] = []
    for column in range(len(grid.layers)):
        bars = grid.cells.get((row, column), ())
        if len(bars) != 1:
            continue
        (bar,) = bars
        before = runs[-1] if runs else None
        joined = before is not None and before.last == column - 1
        if before is not None and joined and before.group == bar.group is not None:
            runs[-1] = _Run(bar.group, row, before.first, column, bar.kept)
        else:
            runs.append(_Run(bar.group, row, column, column, bar.kept))
    return runs


def _draw_cells(axes: Axes, grid: Grid, place: _Layout, chosen: Mapping[str, int]) -> None:
    runs = [run for row in range(len(grid.rows)) for run in _runs(grid, row)]
    for run in runs:
        x, width = place.x[run.first], place.x[run.last] - place.x[run.first] + place.cell_width
        colour = _colour(run.group, chosen)
        box = (x, place.y[run.row], width, place.cell_height)
        _draw_box(axes, box, colour, run.kept)
        for column in range(run.first + 1, run.last + 1):
            _draw_seam(axes, place.x[column] - _GAP / 2, place.y[run.row], place.cell_height)
        if colour is not None and place.cell_height >= 0.14:
            _draw_share(axes, x + width / 2, box[1] + box[3] / 2, run.kept)
    by_group = sorted((r for r in runs if r.group), key=lambda r: (str(r.group), r.row, r.first))
    for _, members in groupby(by_group, key=lambda run: run.group):
        _join(axes, list(members), place, chosen)
    for (row, column), bars in grid.cells.items():
        if len(bars) > 1:
            _draw_bars(axes, bars, place.x[column], place.y[row], place, chosen)


def _colour(group: str | None, chosen: Mapping[str, int]) -> str | None:
    """None for dense."""
    if group is None:
        return None
    return PALETTE[chosen[group]] if group in chosen else ALONE


def _draw_seam(axes: Axes, x: float, y: float, height: float) -> None:
    """Where a layer ends inside a run: at the edges only, the middle is for the number."""
    for top, bottom in ((0.0, 0.22), (0.78, 1.0)):
        ys = [y + top * height, y + bottom * height]
        axes.plot([x, x], ys, color=INK, alpha=0.45, linewidth=0.6, zorder=3)


Box = tuple[float, float, float, float]


def _draw_box(axes: Axes, box: Box, colour: str | None, kept: float) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    if colour is None:
        axes.add_patch(
            Rectangle(
                (x, y), width, height, facecolor=DENSE, edgecolor=HATCH, hatch="////", linewidth=0
            )
        )
    else:
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=mixed(colour, "#FFFFFF", 0.78), linewidth=0)
        )
        filled = height * min(kept, 1.0)
        axes.add_patch(
            Rectangle((x, y + height - filled), width, filled, facecolor=colour, linewidth=0)
        )
    edge = HATCH if colour is None else mixed(colour, "#000000", 0.4)
    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=edge, linewidth=0.8, zorder=4)
    )


def _draw_share(axes: Axes, x: float, y: float, kept: float) -> None:
    text = f"{kept:.2f}".removeprefix("0")
    axes.text(x, y, text, fontsize=6, ha="center", va="center", color=INK, zorder=5)


def _join(axes: Axes, runs: Sequence[_Run], place: _Layout, chosen: Mapping[str, int]) -> None:
    """Lines between the runs of one group, in the gaps between rows and columns."""
    if len(runs) < 2 or runs[0].group is None:
        return
    colour = mixed(_colour(runs[0].group, chosen) or INK, "#000000", 0.4)
    for a, b in pairwise(runs):
        xs, ys = _link(a, b, place)
        axes.plot(
            xs, ys, color=colour, linewidth=2.0, marker="o", markersize=2.4, markevery=[0, -1],
            solid_capstyle="round", zorder=6,
        )  # fmt: skip


def _link(a: _Run, b: _Run, place: _Layout) -> tuple[list[float], list[float]]:
    width, height = place.cell_width, place.cell_height
    common = range(max(a.first, b.first), min(a.last, b.last) + 1)
    inside = 0.03
    if a.row != b.row and common and b.row == a.row + 1:
        x = place.x[common[0]] + width * 0.18
        return [x, x], [place.y[a.row] + height - inside, place.y[b.row] + inside]
    low = place.y[a.row] + height
    if a.row == b.row:
        left, right = place.x[a.last] + width - 0.06, place.x[b.first] + 0.06
        gutter = low + _GAP / 2
        return [left, left, right, right], [low - inside, gutter, gutter, low - inside]
    gutter = place.x[b.first] - _GAP / 2
    start = place.x[a.first] + 0.06
    between, high = low + _GAP / 2, place.y[b.row] + height / 2
    return (
        [start, start, gutter, gutter, place.x[b.first] + inside],
        [low - inside, between, between, high, high],
    )


def _bars_fit(bars: Sequence[Bar], place: _Layout) -> bool:
    return place.cell_width / len(bars) >= 0.035


def _draw_bars(
    axes: Axes,
    bars: Sequence[Bar],
    x: float,
    y: float,
    place: _Layout,
    chosen: Mapping[str, int],
) -> None:
    """A cell of several slices: a bar each, as high as the share that it keeps; where bars were
    too thin to see, their average."""
    from matplotlib.patches import Rectangle

    if not _bars_fit(bars, place):
        mean = sum(bar.kept for bar in bars) / len(bars)
        _draw_box(axes, (x, y, place.cell_width, place.cell_height), AVERAGE, mean)
        _draw_share(axes, x + place.cell_width / 2, y + place.cell_height / 2, mean)
        return
    width, height = place.cell_width / len(bars), place.cell_height
    for number, bar in enumerate(bars):
        colour = _colour(bar.group, chosen)
        filled = height * min(bar.kept, 1.0)
        axes.add_patch(
            Rectangle(
                (x + number * width, y + height - filled),
                width,
                filled,
                facecolor=HATCH if colour is None else colour,
                linewidth=0,
            )
        )
    axes.add_patch(
        Rectangle((x, y), place.cell_width, height, fill=False, edgecolor="#888888", linewidth=0.6)
    )


_Entry = tuple[int, float, str, str]
"""Line, left edge, which key, text."""


def _legend(grid: Grid, plan: Plan, chosen: Mapping[str, int], place: _Layout) -> list[_Entry]:
    # what is averaged shows no colours
    drawn = [b for b in grid.cells.values() if len(b) == 1 or _bars_fit(b, place)]
    keys = {bar.group for bars in drawn for bar in bars}
    texts: list[tuple[str, str]] = []
    if not plan.is_dense:
        texts.append(("share", "filled height, and number: share of the weights' numbers kept"))
    if keys & set(chosen):
        also = "".join(f", or {parts}" for parts in sorted({x.words.parts for x in plan.units}))
        texts.append(("shared", f"joined, in one colour: one shared basis{also}"))
    if keys - set(chosen) - {None}:
        texts.append(("alone", "a basis of its own"))
    if None in keys:
        texts.append(("dense", "dense: kept as it is"))
    if len(grid.cells) < len(grid.rows) * len(grid.layers):
        texts.append(("none", "no such weight in this layer"))
    several = [bars for bars in grid.cells.values() if len(bars) > 1]
    if any(_bars_fit(bars, place) for bars in several):
        texts.append(("bars", "one bar per slice (head)"))
    if not all(_bars_fit(bars, place) for bars in several):
        texts.append(("average", "average of slices (heads), each with a basis or dense"))
    entries: list[_Entry] = []
    line, x = 0, 0.05
    for key, text in texts:
        width = 0.75 + text_width(text, 7.5) + 0.25
        if x > 0.05 and x + width > place.width:
            line, x = line + 1, 0.05
        entries.append((line, x, key, text))
        x += width
    return entries


def _draw_legend(axes: Axes, entries: Sequence[_Entry], place: _Layout) -> None:
    top = place.height + 0.14
    for line, x, key, text in entries:
        y = top + 0.3 * line
        cell: Box = (x, y, 0.3, 0.2)
        if key == "share":
            _draw_box(axes, cell, ALONE, 0.4)
            _draw_share(axes, x + 0.15, y + 0.1, 0.4)
        elif key == "shared":
            _draw_box(axes, (x, y, 0.62, 0.2), PALETTE[0], 0.6)
            _draw_seam(axes, x + 0.31, y, 0.2)
        elif key == "alone":
            _draw_box(axes, cell, ALONE, 1.0)
        elif key == "average":
            _draw_box(axes, cell, AVERAGE, 0.6)
        elif key == "dense":
            _draw_box(axes, cell, None, 1.0)
        elif key == "bars":
            bars = [Bar("", f"{n}", kept) for n, kept in enumerate((0.8, 0.5, 0.65, 0.3))]
            small = _Layout(0, 0, (), (), 0.3, 0.2, 0, 0)
            _draw_bars(axes, bars, x, y, small, {"0": 0, "1": 1, "2": 0, "3": 2})
        shift = 0.7 if key == "shared" else 0.38
        axes.text(x + shift, y + 0.1, text, fontsize=7.5, va="center", color=INK)


__all__ = ["draw_plan", "plan_figure"]
