"""A compilation as one HTML page that needs nothing beside itself.

The page has no links to elsewhere, reads on a phone and in dark mode, and its picture has a name
for every cell. Everything in it is escaped: names come from models and folders of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version

import yaml

from fxshare.config import ShareConfig
from fxshare.plans.plan import Plan
from fxshare.result.group_report import GroupReport
from fxshare.result.record import Record
from fxshare.result.refinement import Refinement
from fxshare.result.report import Report
from fxshare.views.figure import ALONE, PALETTE, colours
from fxshare.views.grid import Bar, grid_of
from fxshare.views.table import outlook_lines, trials_table

_CELL_WIDTH, _CELL_HEIGHT, _GAP = 34, 26, 3
_HEAD, _LETTER = 24, 6.6
_CURVE = (560, 260)
_MARGIN = (64, 16, 20, 40)
"""Of a curve: left, right, top, bottom."""


@dataclass(frozen=True)
class _Text:
    x: float
    y: float
    text: str
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class _Cell:
    name: str
    label: str
    x: float
    y: float
    width: float
    height: float
    fill: str | None
    share: float | None


@dataclass(frozen=True)
class _Picture:
    width: int
    height: int
    texts: Sequence[_Text]
    cells: Sequence[_Cell]
    first: Sequence[str]
    """The lines of the first cell."""


@dataclass(frozen=True)
class _Table:
    id: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""


@dataclass(frozen=True)
class _Line:
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class _Curve:
    id: str
    title: str
    text: str
    label: str
    width: int
    height: int
    axes: Sequence[_Line]
    texts: Sequence[_Text]
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Again:
    text: str
    commands: str
    config: str


def page_of(record: Record, name: str, why: Callable[[str], Sequence[str]]) -> str:
    """The page of a compiled model; ``name`` is the folder that it is in, ``why`` tells what became
    of a slice."""
    import jinja2

    report, plan = record.report, record.plan
    text = (resources.files("fxshare.views") / "page.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(
        version=version("fxshare"),
        title=f"{report.model}, {plan.mode} mode: {report.params_kept:.1%} of the numbers kept",
        lead=_lead(report),
        figures=list(_figures(report, plan)),
        lines=[*report.warnings, *outlook_lines(plan, record.config), *report.notes],
        picture=_picture(plan, report, why),
        tables=list(_tables(report, plan)),
        curves=[_curve(number, one) for number, one in enumerate(record.refined, 1)],
        again=_again(record, name),
    )


def _lead(report: Report) -> str:
    text = (
        f"{report.sites} linear modules, captured by the {report.front_end} front end in "
        f"{report.dtype}"
    )
    if report.calibration is None:
        return f"{text}; no calibration data."
    tokens, batches = report.calibration["tokens"], report.calibration["batches"]
    return f"{text}; calibrated on {tokens:,} tokens in {batches} batches."


def _figures(report: Report, plan: Plan) -> Iterator[tuple[str, str]]:
    def change(before: float, after: float) -> str:
        return f"{before:,} → {after:,}"

    def total(name: str) -> int:
        return sum(getattr(group, name) for group in report.groups)

    yield "parameters", change(report.parameters_before, report.parameters_after)
    yield "numbers of matched weights", change(report.numbers_before, report.numbers_after)
    yield "their bytes", change(total("bytes_before"), total("bytes_after"))
    yield "their FLOPs per token", change(total("flops_before"), total("flops_after"))
    shared = sum(len(group.slices) > 1 for group in plan.groups)
    yield "bases", f"{len(plan.groups)}, {shared} of them shared"
    for what, count in plan.others.items():
        yield what, str(count)
    if plan.outlook is not None:
        yield "predicted loss increase", f"{plan.outlook.predicted:.4g}"
        if plan.outlook.measured is not None:
            yield "measured on held-back data", f"{plan.outlook.measured:.4g}"


def _tables(report: Report, plan: Plan) -> Iterator[_Table]:
    header, rows = report.rows()
    yield _Table("groups", "Bases", header, rows)
    header, rows = trials_table(plan)
    if rows:
        text = "Plans that the search has tried; the star marks the one that was kept."
        yield _Table("trials", "Trials", header, rows, text)
    if plan.skipped:
        listed = [[one.name, one.type, one.reason] for one in plan.skipped]
        yield _Table("left", "Left as they are", ["module", "type", "reason"], listed)


# The plan --------------------------------------------------------------------------------------


def _picture(plan: Plan, report: Report, why: Callable[[str], Sequence[str]]) -> _Picture | None:
    if not plan.sites:
        return None
    grid = grid_of(plan)
    chosen = colours(grid)
    reports = {group.name: group for group in report.groups}
    types = max(len(row.type) for row in grid.rows) * _LETTER + 10
    left = types + max(len(row.label) for row in grid.rows) * _LETTER + 12
    texts, cells = [], []
    for column, layer in enumerate(grid.layers):
        x = left + column * (_CELL_WIDTH + _GAP) + _CELL_WIDTH / 2
        texts.append(_Text(x, _HEAD - 8, "–" if layer is None else str(layer), "middle"))
    for number, row in enumerate(grid.rows):
        y = _HEAD + number * (_CELL_HEIGHT + _GAP)
        if not number or row.type != grid.rows[number - 1].type:
            texts.append(_Text(2, y + _CELL_HEIGHT / 2 + 4, row.type, bold=True))
        texts.append(_Text(types, y + _CELL_HEIGHT / 2 + 4, row.label))
        for column in range(len(grid.layers)):
            bars = grid.cells.get((number, column), ())
            x = left + column * (_CELL_WIDTH + _GAP)
            cells += list(_cells(bars, x, y, chosen, lambda bar: _label(bar, reports, why)))
    width = left + len(grid.layers) * (_CELL_WIDTH + _GAP)
    height = _HEAD + len(grid.rows) * (_CELL_HEIGHT + _GAP)
    return _Picture(math.ceil(width), height, texts, cells, cells[0].label.split("\n"))


def _cells(
    bars: Sequence[Bar],
    x: float,
    y: float,
    chosen: Mapping[str, int],
    label: Callable[[Bar], str],
) -> Iterator[_Cell]:
    """The slices of one cell, side by side."""
    for at, bar in enumerate(bars):
        width = round(_CELL_WIDTH / len(bars), 3)
        fill = None
        if bar.group is not None:
            fill = PALETTE[chosen[bar.group]] if bar.group in chosen else ALONE
        share = None if bar.group is None else round(width * min(bar.kept, 1.0), 3)
        left = round(x + at * width, 3)
        yield _Cell(bar.slice, label(bar), left, y, width, _CELL_HEIGHT, fill, share)


def _label(
    bar: Bar, reports: Mapping[str, GroupReport], why: Callable[[str], Sequence[str]]
) -> str:
    lines = [bar.slice, *why(bar.slice)]
    found = None if bar.group is None else reports.get(bar.group)
    if found is not None and found.refined is not None:
        lines.append(f"moved by {found.refined:.1%} in refining")
    return "\n".join(lines)


# Refining --------------------------------------------------------------------------------------


def _curve(number: int, done: Refinement) -> _Curve:
    width, height = _CURVE
    left, right, top, bottom = _MARGIN
    points = [(0.0, done.before.objective), *((p.seconds, p.loss) for p in done.curve)]
    points = [(s, loss) for s, loss in points if math.isfinite(loss)]
    title = "Refined" if number == 1 else f"Refined again, {number}"
    label = (
        f"held-out loss by {done.objective} against seconds, from {done.before.objective:.4g} to "
        f"{done.after.objective:.4g}"
    )
    if len(points) < 2:
        return _Curve(f"refined-{number}", title, f"{done}.", label, width, height, (), (), ())
    most = max(s for s, _ in points) or 1.0
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    spread = (high - low) or abs(high) or 1.0

    def place(seconds: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - right) * seconds / most
        y = top + (height - top - bottom) * (high - loss) / spread
        return round(x, 2), round(y, 2)

    base = height - bottom
    axes = (_Line(left, top, left, base), _Line(left, base, width - right, base))
    texts = (
        _Text(left - 6, top + 4, f"{high:.4g}", "end"),
        _Text(left - 6, base, f"{low:.4g}", "end"),
        _Text(left, base + 16, "0 s", "middle"),
        _Text(width - right, base + 16, f"{most:.0f} s", "end"),
    )
    placed = [place(*point) for point in points]
    return _Curve(f"refined-{number}", title, f"{done}.", label, width, height, axes, texts, placed)


# Again -----------------------------------------------------------------------------------------


def _again(record: Record, name: str) -> _Again:
    text = (
        "MODEL is the original, DATA the calibration data (and other text to evaluate on). The "
        "plan is in plan.json of the folder, what was configured in its config.yaml."
    )
    commands = [
        f"fxshare compile MODEL -c {name}/config.yaml --plan {name}/plan.json --calibration DATA "
        "-o again/"
    ]
    for done in record.refined:
        objective = done.objective if done.objective in ("kl", "ce", "hidden", "blocks") else "kl"
        commands.append(
            f"fxshare refine again/ --teacher MODEL --data DATA --steps {done.steps} "
            f"--objective {objective} --seed {done.seed} -o again/"
        )
    commands += [
        f"fxshare verify MODEL {name}",
        f"fxshare eval {name} --against MODEL --data DATA",
        f"fxshare report {name} --html report.html",
    ]
    return _Again(text, "\n".join(commands), _yaml(record.config))


def _yaml(config: ShareConfig) -> str:
    plain = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


__all__ = ["page_of"]
