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
    kinds: Annotated[
        str, typer.Option("--kinds", help="What competes, such as basis,units,heads.")
    ] = "basis",
    bits: Annotated[
        str, typer.Option("--bits", help="How many bits a number may have, such as 16,8,4.")
    ] = "16",
    kept: Annotated[
        float,
        typer.Option("--keep", help="Share of the numbers kept; with several bits, of the bytes."),
    ] = 0.8,
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
      fxshare bench planner --layers 32 --kinds basis,units,heads --bits 16,8,4 --keep 0.25
    """
    from fxshare.bench.planner import bench_planner, draw
    from fxshare.bench.planner import table as rows_of
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    counts, widths = numbers_of("--layers", layers, "8,32"), numbers_of("--bits", bits, "16,8,4")
    if not 0 < kept <= 1:
        raise fxshare.errors.ConfigError(f"--keep: expected a share in (0, 1], found {kept}")
    if plot is not None:
        check_drawable(plot)
    result = bench_planner(
        counts, kept=kept, kinds=[kind.strip() for kind in kinds.split(",")], bits=widths
    )
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    return Result(result.to_dict(), "\n".join([table(header, rows), "", str(result.environment)]))


def numbers_of(option: str, text: str, example: str) -> list[int]:
    """The whole numbers that an option names."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise fxshare.errors.ConfigError(
            f"{option}: expected numbers such as {example}; found {text!r}"
        ) from None
