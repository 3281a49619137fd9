"""``fxshare plan``."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.option_groups import Data, Wanted, captured_with, spread
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Debug,
    Draw,
    OptionalModel,
    Quiet,
    Verbose,
    WorkFolder,
)
from fxshare.cli.output import Result, note, table
from fxshare.cli.ranks import is_first

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from fxshare.compiling.survey import Survey
    from fxshare.config import ShareConfig
    from fxshare.planning.sweep import Alternative
    from fxshare.plans.plan import Plan

_SHARES = tuple(round(0.3 + 0.7 * at / 16, 6) for at in range(17))
"""The budgets of a sweep, as shares of the dense cost."""


@spread
def plan_model(
    model: OptionalModel = None,
    *,
    wanted: Wanted,
    work: WorkFolder = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON."),
    ] = None,
    draw: Draw = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-",
            help="Plan for budgets from 0.3 to 1 as well and draw the predicted losses (.svg, "
            ".png, .pdf), or print them (-). Needs a budget and --calibration.",
        ),
    ] = None,
    sweep_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure as many budgets of --sweep on held-back data as N minutes allow. "
            "Default: as long as the plan itself took; 0 only predicts.",
        ),
    ] = None,
    data: Data,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Show what would share a basis, at which rank, what stays dense and why; nothing is rewritten.

    Without -c the configuration is what 'fxshare init' finds in the model. Without MODEL another
    budget is planned from the folder of --work, in seconds. The JSON of --json or -o
    can be edited by hand and given to 'fxshare compile --plan'.

    \b
    Examples:
      fxshare plan path/to/gpt2 -c configs/gpt2-basis-sharing.yaml -o plan.json
      fxshare plan embedded --keep 0.8 --calibration stdlib --draw plan.svg
      fxshare plan --work w/ --keep 0.6
    """
    del as_json, debug, verbose, quiet
    from fxshare.base.files import write_text

    picture = None if sweep in (None, "-") else Path(str(sweep))
    shares = _SHARES if sweep is not None else ()
    _check_first(output, draw, picture)
    _check_minutes(sweep_minutes, sweep, model)
    if model is None:
        data.refuse("without MODEL nothing is measured; give MODEL as well")
        made = _replanned(work, wanted, shares)
    else:
        _check_data(sweep, data)
        made = _planned(model, wanted, data, allow_missing, work, (sweep, sweep_minutes))
    found = made.survey
    if not is_first():
        return Result(None, "")
    plan = found.plan
    written = []
    if output is not None:
        write_text(output, plan.to_json())
        written.append(output)
    if draw is not None:
        draw_named(plan, draw, made.name)
        written.append(draw)
    if picture is not None and found.sweep is not None:
        from fxshare.views.sweep import draw_sweep

        draw_sweep(found.sweep, picture, outlook=plan.outlook)
        written.append(picture)
    blocks = [made.text]
    if sweep == "-":
        blocks.append(_sweep_text(found))
    blocks += [f"written to {path}" for path in written]
    return Result(_data(found), "\n".join(blocks))


@dataclass(frozen=True)
class _Made:
    """A plan, what it is of, and how it is told."""

    survey: Survey
    name: str
    text: str


def _planned(
    model: str,
    wanted: Wanted,
    data: Data,
    allow_missing: bool,
    work: Path | None,
    sweeping: tuple[str | None, float | None],
) -> _Made:
    """Of a model; ``sweeping`` says where a sweep goes and how many minutes it may measure."""
    from fxshare.capture import dtype_of
    from fxshare.capture.once import captures_kept
    from fxshare.compiling.survey import survey
    from fxshare.loading.names import load_model
    from fxshare.models.traits import example_ids
    from fxshare.proposing.coverage import left_dense

    sweep, minutes = sweeping
    cfg = wanted.from_files()
    if cfg is not None:
        _check_budget(cfg, sweep)
    loaded = load_model(model, allow_missing=allow_missing)
    batches = data.batches(loaded)
    example = None if batches else example_ids(loaded.model, seed=data.seed)
    with captures_kept():  # what is looked at for a configuration is what is planned
        if cfg is None:
            cfg = wanted.from_model(loaded, model, captured_with(loaded, batches, example))
            _check_budget(cfg, sweep)
        note(f"planning {model} ({type(loaded.model).__name__})")
        found = survey(
            loaded.model,
            cfg,
            calibration=batches,
            example=example,
            seed=data.seed,
            shares=_SHARES if sweep is not None else (),
            sweep_seconds=None if minutes is None else 60 * minutes,
            work=work,
        )
    plan = found.plan
    size = dtype_of(loaded.model).itemsize
    times = None if plan.is_dense else _times(plan, loaded.model)
    text = plan_text(plan, cfg, element_size=size, alternatives=found.alternatives, times=times)
    dense = left_dense(loaded.model, plan.sites, plan.skipped)
    return _Made(found, model, text if dense is None else f"warning: {dense}\n{text}")


def _replanned(work: Path | None, wanted: Wanted, shares: Sequence[float]) -> _Made:
    """From what a work folder has."""
    from fxshare.compiling.replan import replan
    from fxshare.planning.stored_problem import read_problem

    if work is None:
        raise fxshare.errors.ConfigError(
            "expected MODEL, or with --work DIR a folder of an earlier run to plan from; found "
            "neither"
        )
    wanted.refuse_embeddings(f"{work} has the weights of the run that wrote it")
    found = replan(work, wanted.config, overrides=wanted.overrides, shares=shares)
    size = read_problem(work).element_size
    text = plan_text(found.plan, None, element_size=size, alternatives=found.alternatives)
    return _Made(found, str(work), f"predicted from {work}, and not measured\n{text}")


def _check_first(output: Path | None, draw: Path | None, picture: Path | None) -> None:
    """Refuse before hours of planning what writing and drawing would refuse after them."""
    from fxshare.views.figure import check_drawable

    if output is not None and output.is_dir():
        raise fxshare.errors.StoreError(f"-o {output}: expected a file to write, found a folder")
    for path in (draw, picture):
        if path is not None:
            check_drawable(path)


def _check_minutes(minutes: float | None, sweep: str | None, model: str | None) -> None:
    if minutes is None:
        return
    if sweep is None:
        raise fxshare.errors.ConfigError("--sweep-minutes: for the budgets of --sweep FILE or -")
    if model is None and minutes > 0:
        raise fxshare.errors.ConfigError(
            "--sweep-minutes: what a work folder has predicts losses; give MODEL to measure them"
        )


def _check_data(sweep: str | None, data: Data) -> None:
    if sweep is not None and data.calibration is None:
        raise fxshare.errors.ConfigError(
            f"--sweep {sweep}: losses are predicted from data; add --calibration SPEC"
        )


def _check_budget(cfg: ShareConfig, sweep: str | None) -> None:
    if sweep is not None and cfg.budget is None:
        raise fxshare.errors.ConfigError(
            f"--sweep {sweep}: predicts losses under budgets, and the {cfg.mode} mode has none; "
            "give one, such as --keep 0.8"
        )


def _times(plan: Plan, model: nn.Module) -> str:
    """How long the plan is expected to take beside dense; a warning where that is longer."""
    from fxshare.cost_model import forecasts
    from fxshare.cost_model.device import how_to_measure_for, rates_of_model
    from fxshare.cost_model.whole import dense_steps, prompt_length
    from fxshare.views.table import slower_than_dense, time_table

    rates = rates_of_model(model)
    if rates is None:
        return (
            "times: this device was not measured; after "
            f"'{how_to_measure_for(model)}' a plan says how long it takes"
        )
    length = prompt_length(model)
    found = forecasts(plan, rates, prefill=length, whole=dense_steps(model, length))
    slower = slower_than_dense(found)
    if slower is not None:
        warnings.warn(slower, fxshare.errors.FxShareWarning, stacklevel=2)
    header, rows = time_table(found)
    return table(header, rows, left=3)


def draw_named(plan: Plan, path: Path, name: str) -> None:
    """Draw a plan under the name of its model or file."""
    from fxshare.views.picture import draw_plan

    draw_plan(plan, path, title=f"{name}, {plan.mode} mode")


def _data(found: Survey) -> Any:
    """The plan itself, or with a sweep an object of both."""
    plan = json.loads(found.plan.to_json())
    return plan if found.sweep is None else {"plan": plan, "sweep": asdict(found.sweep)}


def _sweep_text(found: Survey) -> str:
    from fxshare.views.table import sweep_table

    assert found.sweep is not None
    header, rows = sweep_table(found.sweep)
    measured = sum(point.measured is not None for point in found.sweep.planned)
    if measured:
        also = f"; {measured} of them carried out and measured on held-back data"
    else:
        also = ""
    return (
        "\nother budgets, as shares of the dense cost; predicted on one set of statistics, before "
        f"any search{also}\n{table(header, rows, left=0)}"
    )


def read_plan(path: Path) -> Plan:
    """A plan from a file; a ``PlanError`` names the file and what is wrong with it."""
    from fxshare.plans.plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fxshare.errors.PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise fxshare.errors.PlanError(
            f"{path}: expected JSON in UTF-8; byte {error.start} is not"
        ) from error
    except fxshare.errors.PlanError as error:
        raise fxshare.errors.PlanError(f"{path}: {error}") from error


def plan_text(
    plan: Plan,
    cfg: ShareConfig | None = None,
    *,
    element_size: int | None = None,
    alternatives: Mapping[str, Alternative | None] | None = None,
    times: str | None = None,
) -> str:
    """The plan as tables: groups, what stays dense and why, totals, ``times``, the search."""
    from fxshare.views.table import (
        dense_lines,
        groups_table,
        head_lines,
        outlook_lines,
        trials_table,
    )

    lines = head_lines(plan, element_size=element_size)
    if not plan.is_dense:
        header, rows = groups_table(plan)
        lines.append(table(header, rows, left=2))
    else:
        lines.append("no groups: every slice keeps its original weight rows")
    lines += dense_lines(plan, cfg, alternatives)
    lines += outlook_lines(plan, cfg)
    if times is not None:
        lines.append(times)
    header, rows = trials_table(plan)
    if rows:
        lines.append(table(header, rows, left=2))
    return "\n".join(lines)
