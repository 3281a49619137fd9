"""``fxshare bench planner``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxshare
from fxshare.cli.options import AsJson, Debug, Quiet, Verbose
from fxshare.cli.output import Result, table


def planner(
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers of layers, comma separated.")
    ] = "4,8,16,32,80",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw time against sites.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """How long planning takes on Llama-7B-shaped problems with given spectra.

    \b
    Example:
      fxshare bench planner --layers 32 --plot planner.svg
    """
    from fxshare.bench.planner import bench_planner, draw
    from fxshare.bench.planner import table as rows_of
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    try:
        counts = [int(part) for part in layers.split(",")]
    except ValueError:
        raise fxshare.errors.ConfigError(
            f"--layers: expected numbers such as 8,32; found {layers!r}"
        ) from None
    if plot is not None:
        check_drawable(plot)
    result = bench_planner(counts)
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    return Result(result.to_dict(), "\n".join([table(header, rows), "", str(result.environment)]))
