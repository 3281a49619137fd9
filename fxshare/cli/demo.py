"""``fxshare demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxshare.cli.options import AsJson, Debug, Quiet, Seed, Verbose
from fxshare.cli.output import Result, note, table


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the data: faster, and noisier.")
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine", help="A row more: the smallest planned model, refined for a minute."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write the reports here."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Compress the packaged model and compare it with the original; downloads nothing.

    Needs about two minutes on two cores, one more with --refine.

    \b
    Example:
      fxshare demo --quick
    """

    from fxshare.bench import demo as run

    del as_json, debug, verbose, quiet
    found = run.demo(quick=quick, refine=refine, out=output, say=note, seed=seed)
    header, rows = run.table(found)
    lines = [table(header, rows), "", *run.lines_below(found)]
    for row in found.rows:
        lines += ["", f"{row.name} writes:", row.sample]
    if output is not None:
        lines += ["", f"written to {output}"]
    return Result(found.to_dict(), "\n".join(lines))
