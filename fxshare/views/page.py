"""A compilation as one HTML page that needs nothing beside itself.

The page has no links to elsewhere, reads on a phone and in dark mode, and its picture has a name
for every cell. Everything in it is escaped: names come from models and folders of others.
"""

from __future__ import annotations

import math
import shlex
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
from fxshare.views.page_curves import Curve, Text, refined_curve
from fxshare.views.table import outlook_lines, trials_table

_CELL_WIDTH, _CELL_HEIGHT, _GAP = 34, 26, 3
_HEAD, _LETTER = 24, 6.6


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
    texts: Sequence[Text]
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
class _Again:
    text: str
    commands: str
    config: str


def page_of(
    record: Record,
    name: str,
    why: Callable[[str], Sequence[str]],
    frontiers: Sequence[Curve] = (),
) -> str:
    """The page of a compiled model; ``name`` is the folder that it is in, ``why`` tells what became
    of a slice; ``frontiers`` are shown beside the curves of refining."""
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
        curves=[
            *(refined_curve(number, one) for number, one in enumerate(record.refined, 1)),
            *frontiers,
        ],
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
        texts.append(Text(x, _HEAD - 8, "–" if layer is None else str(layer), "middle"))
    for number, row in enumerate(grid.rows):
        y = _HEAD + number * (_CELL_HEIGHT + _GAP)
        if not number or row.type != grid.rows[number - 1].type:
            texts.append(Text(2, y + _CELL_HEIGHT / 2 + 4, row.type, bold=True))
        texts.append(Text(types, y + _CELL_HEIGHT / 2 + 4, row.label))
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


# Again -----------------------------------------------------------------------------------------


def _again(record: Record, name: str) -> _Again:
    text = (
        "MODEL is the original, DATA the calibration data (and other text to evaluate on). The "
        "plan is in plan.json of the folder, what was configured in its config.yaml."
    )
    folder, config, plan = (
        shlex.quote(f"{name}{file}") for file in ("", "/config.yaml", "/plan.json")
    )
    data = "" if record.report.calibration is None else " --calibration DATA"
    commands = [f"fxshare compile MODEL -c {config} --plan {plan}{data} -o again/"]
    made = "again/"
    for number, done in enumerate(record.refined, 1):
        if not done.steps:
            continue
        before, made = made, f"again-refined{'' if number == 1 else f'-{number}'}/"
        commands.append(f"fxshare refine {before} {_refining(done)} -o {made}")
    if record.refined:
        text += " What refining was told beside its objective, rate, steps and seed is not kept."
    commands += [
        f"fxshare verify MODEL {folder}",
        f"fxshare eval {folder} --against MODEL --data DATA",
        f"fxshare report {folder} --html report.html",
    ]
    return _Again(text, "\n".join(commands), _yaml(record.config))


def _refining(done: Refinement) -> str:
    objective = done.objective if done.objective in ("kl", "ce", "hidden", "blocks") else "kl"
    also = ",".join(kind for kind in done.trained if kind != "factors")
    rate = done.learning_rate
    return (
        f"--teacher MODEL --data DATA --steps {done.steps} --objective {objective}"
        + (f" --also {also}" if also else "")
        + (f" --learning-rate {rate:.6g}" if objective != "blocks" and 0 < rate < 1 else "")
        + f" --seed {done.seed}"
    )


def _yaml(config: ShareConfig) -> str:
    plain = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


__all__ = ["page_of"]
