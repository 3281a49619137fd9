"""Pictures of a plan, and of what a budget buys, by matplotlib (the ``viz`` extra).

A plan is drawn as a grid: layers are columns, weight types and their parts and heads rows. All
lengths are inches, y runs downwards. Pictures of equal plans are equal byte for byte.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxshare.errors import ConfigError
from fxshare.plans import Group, Outlook, Plan, Site, SliceSpec
from fxshare.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fxshare.planned import Sweep

FORMATS = (".svg", ".png", ".pdf")
MOST_ROWS = 64
"""With more rows than this heads become bars in one row, and then parts do."""

# Tol's light scheme: distinct to colour-blind eyes, and dark text is readable on all of them
_PALETTE = ("#77AADD", "#EE8866", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#EEDD88", "#C6A5D8")
_ALONE = "#B4BECC"
_AVERAGE = "#D8CDB8"
_DENSE, _HATCH = "#EFEFEF", "#A6A6A6"
_INK = "#1A1A1A"
_GAP, _TYPE_GAP = 0.05, 0.13


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
    group_of = {name: group for group in plan.groups for name in group.slices}
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


def _kept(group: Group | None) -> float:
    return 1.0 if group is None else group.stored_numbers / group.dense_numbers


def colours(grid: Grid) -> dict[str, int]:
    """A number of the palette for every group of several slices, unlike its neighbours' where the
    palette allows; groups of one slice have none."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    group_at: dict[tuple[int, int, int], str] = {}
    for (row, column), bars in grid.cells.items():
        for number, bar in enumerate(bars):
            if bar.group is not None:
                places.setdefault(bar.group, []).append((row, column, number))
                group_at[row, column, number] = bar.group
    shared = {group for group, at in places.items() if len(at) > 1}
    chosen: dict[str, int] = {}
    used: Counter[int] = Counter()
    for group in (group for group in places if group in shared):
        near: Counter[int] = Counter()
        for place in places[group]:
            for step in ((0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)):
                row, column, number = (a + b for a, b in zip(place, step, strict=True))
                other = chosen.get(group_at.get((row, column, number), ""))
                near[-1 if other is None else other] += 1
        number = min(range(len(_PALETTE)), key=lambda c: (near[c], used[c], c))
        chosen[group] = number
        used[number] += 1
    return chosen


# Files -----------------------------------------------------------------------------------------


def check_drawable(path: Path) -> None:
    """:class:`ConfigError` where a picture could not be written for want of matplotlib or because
    of its ending; to be asked before hours of planning."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path}: expected a picture ending in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; "
            f"found {path.suffix or 'no ending'}"
        )
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{path}: pictures need matplotlib, which is not installed: pip install 'fxshare[viz]'"
        ) from error


def draw_plan(plan: Plan, path: Path, *, title: str = "") -> None:
    """Draw a plan into an ``.svg``, ``.png`` or ``.pdf`` file, whole or not at all."""
    check_drawable(path)
    with _own_settings():
        _write(plan_figure(plan, title=title), path)


def draw_sweep(sweep: Sweep, path: Path, *, outlook: Outlook | None = None) -> None:
    """Draw predicted loss against what is kept, with the plan that was chosen marked."""
    check_drawable(path)
    with _own_settings():
        _write(sweep_figure(sweep, outlook=outlook), path)


def write_figure(make: Callable[[], Figure], path: Path) -> None:
    """Make a figure under matplotlib's own settings and write it, whole or not at all."""
    check_drawable(path)
    with _own_settings():
        _write(make(), path)


@contextmanager
def _own_settings() -> Iterator[None]:
    """Matplotlib's defaults whatever the user's style is, which is as it was afterwards."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "fxshare", "hatch.linewidth": 0.6})
        yield


def _write(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    # no dates and no version of the library: equal pictures are equal files
    undated: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": "fxshare"},
        "pdf": {"CreationDate": None, "Creator": "fxshare", "Producer": "fxshare"},
        "png": {"Software": "fxshare"},
    }
    content = io.BytesIO()
    figure.savefig(
        content, format=kind, metadata=undated[kind], dpi=144, bbox_inches="tight", pad_inches=0.12
    )
    write_bytes(path, content.getvalue())


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
    types = max(_text_width(row.type, 8, bold=True) for row in grid.rows)
    labels = max(_text_width(row.label, 7) for row in grid.rows)
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


def _text_width(text: str, size: float, *, bold: bool = False) -> float:
    if not text:
        return 0.0
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(weight="bold" if bold else "normal")
    # an x at the end, because spaces there have no extent
    extent = TextPath((0, 0), text, size=size, prop=font).get_extents()
    return float(extent.width) / 72


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
    for word in text.split(" "):
        if lines and _text_width(f"{lines[-1]} {word}", size, bold=bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _totals(plan: Plan) -> list[str]:
    shared = sum(len(group.slices) > 1 for group in plan.groups)
    grouped = sum(len(group.slices) for group in plan.groups)
    dense = sum(len(site.slices) for site in plan.sites) - grouped
    parts = [
        f"{len(plan.groups)} bases, {shared} of them shared",
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
    return _PALETTE[chosen[group]] if group in chosen else _ALONE


def _draw_seam(axes: Axes, x: float, y: float, height: float) -> None:
    """Where a layer ends inside a run: at the edges only, the middle is for the number."""
    for top, bottom in ((0.0, 0.22), (0.78, 1.0)):
        ys = [y + top * height, y + bottom * height]
        axes.plot([x, x], ys, color=_INK, alpha=0.45, linewidth=0.6, zorder=3)


Box = tuple[float, float, float, float]


def _draw_box(axes: Axes, box: Box, colour: str | None, kept: float) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    if colour is None:
        axes.add_patch(
            Rectangle(
                (x, y), width, height, facecolor=_DENSE, edgecolor=_HATCH, hatch="////", linewidth=0
            )
        )
    else:
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=_mixed(colour, "#FFFFFF", 0.78), linewidth=0)
        )
        filled = height * min(kept, 1.0)
        axes.add_patch(
            Rectangle((x, y + height - filled), width, filled, facecolor=colour, linewidth=0)
        )
    edge = _HATCH if colour is None else _mixed(colour, "#000000", 0.4)
    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=edge, linewidth=0.8, zorder=4)
    )


def _mixed(colour: str, other: str, share: float) -> str:
    parts = [
        round(int(colour[at : at + 2], 16) * (1 - share) + int(other[at : at + 2], 16) * share)
        for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02X}" for part in parts)


def _draw_share(axes: Axes, x: float, y: float, kept: float) -> None:
    text = f"{kept:.2f}".removeprefix("0")
    axes.text(x, y, text, fontsize=6, ha="center", va="center", color=_INK, zorder=5)


def _join(axes: Axes, runs: Sequence[_Run], place: _Layout, chosen: Mapping[str, int]) -> None:
    """Lines between the runs of one group, in the gaps between rows and columns."""
    if len(runs) < 2 or runs[0].group is None:
        return
    colour = _mixed(_colour(runs[0].group, chosen) or _INK, "#000000", 0.4)
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
        _draw_box(axes, (x, y, place.cell_width, place.cell_height), _AVERAGE, mean)
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
                facecolor=_HATCH if colour is None else colour,
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
    if plan.groups:
        texts.append(("share", "filled height, and number: share of the weights' numbers kept"))
    if keys & set(chosen):
        texts.append(("shared", "joined, in one colour: one shared basis"))
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
        width = 0.75 + _text_width(text, 7.5) + 0.25
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
            _draw_box(axes, cell, _ALONE, 0.4)
            _draw_share(axes, x + 0.15, y + 0.1, 0.4)
        elif key == "shared":
            _draw_box(axes, (x, y, 0.62, 0.2), _PALETTE[0], 0.6)
            _draw_seam(axes, x + 0.31, y, 0.2)
        elif key == "alone":
            _draw_box(axes, cell, _ALONE, 1.0)
        elif key == "average":
            _draw_box(axes, cell, _AVERAGE, 0.6)
        elif key == "dense":
            _draw_box(axes, cell, None, 1.0)
        elif key == "bars":
            bars = [Bar("", f"{n}", kept) for n, kept in enumerate((0.8, 0.5, 0.65, 0.3))]
            small = _Layout(0, 0, (), (), 0.3, 0.2, 0, 0)
            _draw_bars(axes, bars, x, y, small, {"0": 0, "1": 1, "2": 0, "3": 2})
        shift = 0.7 if key == "shared" else 0.38
        axes.text(x + shift, y + 0.1, text, fontsize=7.5, va="center", color=_INK)


# What a budget buys ----------------------------------------------------------------------------


def sweep_figure(sweep: Sweep, *, outlook: Outlook | None = None) -> Figure:
    """Predicted loss against what is kept, the loss on a log scale.

    Points that lose nothing have no place on it and are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for points, label, colour, marker in (
        (sweep.planned, "planned, a point per budget", "#2A6FB0", "o"),
        (sweep.uniform, "every slice alone, the same share", "#8A8A8A", "s"),
    ):
        shown = [point for point in points if point.loss > 0]
        axes.plot(
            [point.kept for point in shown],
            [point.loss for point in shown],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label=label,
        )
    if outlook is not None:
        at = outlook.cost / sweep.dense
        axes.axvline(outlook.budget / sweep.dense, color="#BBBBBB", linestyle="--", linewidth=0.9)
        for value, label, marker in (
            (outlook.predicted, "the plan, predicted", "D"),
            (outlook.measured, "the plan, measured on held-back data", "*"),
        ):
            if value is not None and value > 0:
                axes.plot(
                    [at], [value], linestyle="none", marker=marker, markersize=9,
                    color="#D1603D", markeredgecolor="white", label=label,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel(f"{_UNITS[sweep.unit]} kept, of those of the dense weights")
    axes.set_ylabel(f"loss increase per token ({sweep.loss_name})")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure


_UNITS = {"numbers": "stored numbers", "bytes": "bytes", "flops": "FLOPs per token"}


__all__ = [
    "FORMATS",
    "MOST_ROWS",
    "Bar",
    "Grid",
    "Row",
    "check_drawable",
    "colours",
    "draw_plan",
    "draw_sweep",
    "grid_of",
    "plan_figure",
    "sweep_figure",
]
