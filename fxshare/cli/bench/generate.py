"""``fxshare bench generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from fxshare.cli.options import AsJson, Debug, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, table


def generate(
    shape: Annotated[
        str, typer.Option(metavar="D,LAYERS,HEADS,FFN", help="Of a Llama with random weights.")
    ] = "512,8,8,1408",
    kept: Annotated[
        float, typer.Option("--kept", metavar="SHARE", help="Of every matrix; 1 is exact mode.")
    ] = 0.5,
    prompt: Annotated[int, typer.Option("--prompt", min=2, metavar="T")] = 32,
    new: Annotated[int, typer.Option("--new", min=9, metavar="N", help="Tokens to make.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 7,
    threads: Threads = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Tokens per second of generate(): the graph, lowered, beside module granularity and dense.

    \b
    Example:
      fxshare bench generate --threads 1
    """
    from fxshare.bench.generate import bench_generate, llama
    from fxshare.bench.generate import table as rows_of
    from fxshare.bench.speed.device import threads as using
    from fxshare.bench.speed.subject import GPTShape

    del as_json, debug, verbose, quiet
    sizes = GPTShape.parse(shape)
    with using(threads):
        result = bench_generate(
            llama(sizes.width, sizes.layers, sizes.heads, sizes.ffn, seed=seed),
            shape=shape,
            kept=None if kept == 1 else kept,
            prompt=prompt,
            new=new,
            repeats=repeats,
            seed=seed,
        )
    header, rows = rows_of(result)
    same = "the same tokens" if result.same_tokens else "DIFFERENT tokens"
    below = [
        f"medians of {repeats} interleaved rounds; modules, graph and lowered made {same}",
        *result.notes,
        str(result.environment),
    ]
    return Result(result.to_dict(), "\n".join([table(header, rows), "", *below]))
