"""``fxshare bench frontier``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxshare
from fxshare.cli.bench.quality import sizes_of
from fxshare.cli.options import AllowMissing, AsJson, Debug, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, note, table


def frontier(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Another model; needs --tokens and -c."),
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option(
            "--tokens", metavar="FILE", help="Its tokens: safetensors 'calibration', 'heldout'."
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="Its weight types."),
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded/--no-embedded", help="Measure the embedded model.")
    ] = True,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Shares of the bfloat16 bytes kept, comma separated.")
    ] = "0.5,0.4,0.33,0.28,0.25,0.2,0.15",
    search: Annotated[str, typer.Option("--search", help="off, quick or thorough.")] = "off",
    threads: Threads = 0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Held-out loss at the same bytes: rounding, bases, hidden units, and all of them together.

    The model is cast to bfloat16; bytes are counted in the saved folder. Nothing is trained.

    \b
    Example:
      fxshare bench frontier --sizes 0.5,0.25
      fxshare bench frontier --model ./stories --tokens tokens.safetensors -c llama.yaml
    """
    from fxshare.bench.frontier import bench_frontier
    from fxshare.bench.frontier import table as rows_of
    from fxshare.bench.quality import embedded_case, folder_case
    from fxshare.bench.speed.device import threads as using
    from fxshare.config import load_config

    del as_json, debug, verbose, quiet
    models, files, configs = model or [], tokens or [], config or []
    if not len(models) == len(files) == len(configs):
        raise fxshare.errors.ConfigError(
            f"bench frontier: expected one --tokens and one -c for each --model, found "
            f"{len(models)} models, {len(files)} token files, {len(configs)} configurations"
        )
    cases = [embedded_case()] if embedded else []
    for name, file, path in zip(models, files, configs, strict=True):
        types: dict[str, Any] = load_config(path).model_dump(
            include={"weight_types", "block_pattern"}
        )
        cases.append(folder_case(name, file, types, allow_missing=allow_missing))
    shares = sizes_of(sizes)
    with using(threads):
        result = bench_frontier(cases, sizes=shares, search=search, seed=seed, say=note)
    header, rows = rows_of(result, shares)
    below = [
        "increase of the loss in nats per token on held-out tokens, no training; search: "
        f"{search}; seed {seed}",
        *(f"{name}: dense {loss:.4f}" for name, loss in result.dense_loss.items()),
        f"{result.environment}; {result.seconds:.0f} s",
    ]
    return Result(result.to_dict(), "\n".join([table(header, rows), "", *below]))
