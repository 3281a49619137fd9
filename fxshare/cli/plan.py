"""``fxshare plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxshare.cli.options import (
    AsJson,
    BatchSize,
    Calibration,
    Configs,
    Debug,
    Length,
    Model,
    Seed,
    Sets,
    Tokens,
    calibration_batches,
    config_of,
)
from fxshare.cli.output import Result, table
from fxshare.errors import PlanError

if TYPE_CHECKING:
    from fxshare.plans import Plan


def plan_model(
    model: Model,
    config: Configs = [],  # noqa: B006  typer reads the default, nothing changes it
    set_: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON."),
    ] = None,
    calibration: Calibration = None,
    tokens: Tokens = None,
    length: Length = None,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Show what would share a basis and at which rank; nothing is rewritten.

    The JSON of --json or -o can be edited by hand and given to 'fxshare compile --plan'.

    \b
    Example:
      fxshare plan path/to/gpt2 -c configs/gpt2-basis-sharing.yaml -o plan.json
    """
    del as_json, debug
    import fxshare
    from fxshare.models import example_ids, load_model
    from fxshare.writing import write_text

    cfg = config_of(config, set_)
    loaded = load_model(model)
    batches = calibration_batches(
        loaded, calibration, tokens=tokens, length=length, batch_size=batch_size, seed=seed
    )
    example = None if batches else example_ids(loaded.model, seed=seed)
    plan = fxshare.plan(loaded.model, cfg, calibration=batches, example=example)
    if output is not None:
        write_text(output, plan.to_json())
    text = plan_text(plan)
    if output is not None:
        text += f"\nwritten to {output}"
    return Result(json.loads(plan.to_json()), text)


def read_plan(path: Path) -> Plan:
    """A plan from a file; :class:`PlanError` names the file and what is wrong with it."""
    from fxshare.plans import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: expected JSON in UTF-8; byte {error.start} is not") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan_text(plan: Plan) -> str:
    """The plan as a table, a row per group."""
    from fxshare.planning import break_even_rank

    lines = [
        f"{plan.mode} mode: {len(plan.sites)} sites, {sum(len(s.slices) for s in plan.sites)} "
        f"slices, {len(plan.groups)} groups",
        f"params_kept {plan.params_kept:.4f}: {plan.dense_numbers:,} weights → "
        f"{plan.stored_numbers:,} stored numbers",
    ]
    if plan.groups:
        header = ["group", "type", "layers", "slices", "in→out", "rank", "break-even"]
        header += ["numbers before", "after", "kept"]
        rows = [
            [
                g.name,
                g.type,
                ",".join(map(str, g.layers)) or "–",
                str(len(g.slices)),
                f"{g.in_features}→{g.out_features}",
                str(g.rank),
                str(break_even_rank(g.in_features, g.out_features)),
                f"{g.dense_numbers:,}",
                f"{g.stored_numbers:,}",
                f"{g.stored_numbers / g.dense_numbers:.3f}",
            ]
            for g in plan.groups
        ]
        lines.append(table(header, rows, left=2))
    else:
        lines.append("no groups: every slice keeps its original weight rows")
    lines += [f"not rewritten: {s.name} ({s.type}): {s.reason}" for s in plan.skipped]
    return "\n".join(lines)
