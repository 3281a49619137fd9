"""``fxshare bench compress``."""

from __future__ import annotations

from typing import Annotated

import typer

from fxshare.cli.options import AsJson, Debug, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result


def compress(
    layers: Annotated[int, typer.Option("--layers", min=1)] = 12,
    width: Annotated[int, typer.Option("--width", min=1)] = 768,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 12,
    tokens: Annotated[int, typer.Option("--tokens", min=512)] = 32768,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    threads: Threads = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """What calibration costs beside a forward pass, and factorisation beside an SVD.

    \b
    Example:
      fxshare bench compress --tokens 8192
    """
    from fxshare.bench.compress import bench_compress, lines
    from fxshare.bench.speed.device import threads as using

    del as_json, debug, verbose, quiet
    with using(threads):
        measured = bench_compress(
            layers=layers, width=width, heads=heads, tokens=tokens, repeats=repeats, seed=seed
        )
    return Result(measured.to_dict(), "\n".join(lines(measured)))
