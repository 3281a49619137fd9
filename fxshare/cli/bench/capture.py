"""``fxshare bench capture``."""

from __future__ import annotations

from typing import Annotated

import typer

from fxshare.cli.options import AsJson, Debug, Quiet, Verbose
from fxshare.cli.output import Result


def capture(
    family: Annotated[
        str, typer.Option(metavar="NAME", help="llama, qwen3, gemma, phi3 or neox.")
    ] = "llama",
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Default: the family's own.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Seconds and memory to capture and rewrite a model of 7B shape without weights.

    \b
    Example:
      fxshare bench capture --family qwen3
    """
    from fxshare.bench.capture import bench_capture, lines
    from fxshare.bench.capture import family as model_of

    del as_json, debug, verbose, quiet
    found = bench_capture(lambda: model_of(family, layers))
    return Result(found.to_dict(), "\n".join(lines(found)))
