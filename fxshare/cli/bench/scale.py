"""``fxshare bench scale``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxshare
from fxshare.cli.options import AsJson, Debug, Dtype, Quiet, Seed, Verbose
from fxshare.cli.output import Result, table


def scale(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            help="gpt2, gpt2-medium, tinyllama, llama-7b, or d,L,h,f,vocab for a Llama; again for "
            "more. [gpt2]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Numbers of layers, comma separated. Default: the shape's."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Of the data.")] = 8192,
    length: Annotated[int, typer.Option("--length", metavar="L", help="Tokens a window.")] = 512,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="B", help="Windows a batch.")
    ] = 1,
    keep: Annotated[
        float, typer.Option("--keep", metavar="SHARE", help="Of the matched weights' numbers.")
    ] = 0.8,
    split: Annotated[
        str, typer.Option("--split", help="Of a fused projection: heads, qkv or false.")
    ] = "heads",
    dtype: Dtype = "float32",
    threads: Annotated[
        int, typer.Option("--threads", help="Processor threads; 0 leaves torch's choice.")
    ] = 1,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw time against layers.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Processor seconds and memory of every stage, planned, beside Basis Sharing and training.

    \b
    Examples:
      fxshare bench scale --layers 2,4 --plot scale.svg
      fxshare bench scale --shape tinyllama --dtype bfloat16 --json
    """
    from fxshare.bench.scale.measure import Settings
    from fxshare.bench.scale.run import bench_scale
    from fxshare.bench.scale.table import draw, lines_below
    from fxshare.bench.scale.table import table as rows_of
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    if plot is not None:
        check_drawable(plot)
    settings = Settings(tokens, length, batch_size, keep, dtype, threads, split, seed)
    result = bench_scale(shape or ["gpt2"], _counts(layers), settings)
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    below = lines_below(result) + ([] if plot is None else [f"written to {plot}"])
    failed = any(run.failed for run in result.runs)
    text = "\n".join([table(header, rows, left=3), "", *below])
    return Result(result.to_dict(), text, code=int(failed))


def _counts(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise fxshare.errors.ConfigError(
            f"--layers: expected numbers of at least 1, such as 2,4; found {text!r}"
        ) from None
