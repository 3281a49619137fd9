"""``fxshare bench quality``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxshare
from fxshare.cli.options import AllowMissing, AsJson, Debug, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, note, table


def quality(
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
        str, typer.Option("--sizes", help="Shares of stored numbers kept, comma separated.")
    ] = "0.9,0.8,0.7,0.6,0.5,0.4",
    search: Annotated[
        str, typer.Option("--search", help="off, kinds, quick, thorough or refined.")
    ] = "quick",
    kinds: Annotated[
        str, typer.Option("--kinds", help="What planned plans choose from, such as basis,units.")
    ] = "basis",
    refine: Annotated[
        float | None,
        typer.Option(
            "--refine",
            metavar="MINUTES",
            help="Refine Basis Sharing and planned plans so long each, on calibration tokens.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw held-out loss against stored numbers."),
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Held-out loss of planned plans beside Basis Sharing and per-matrix SVD.

    Nothing is trained, unless --refine says for how long.

    \b
    Example:
      fxshare bench quality --sizes 0.8,0.5
      fxshare bench quality --sizes 0.8,0.5 --refine 10 --plot quality.svg
      fxshare bench quality --model ./stories --tokens tokens.safetensors -c llama.yaml
    """
    from fxshare.bench.quality import bench_quality, embedded_case, folder_case
    from fxshare.bench.quality import table as rows_of
    from fxshare.bench.quality_plot import draw
    from fxshare.bench.speed.device import threads as using
    from fxshare.config import load_config
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    models, files, configs = model or [], tokens or [], config or []
    if not len(models) == len(files) == len(configs):
        raise fxshare.errors.ConfigError(
            f"bench quality: expected one --tokens and one -c for each --model, found "
            f"{len(models)} models, {len(files)} token files, {len(configs)} configurations"
        )
    if plot is not None:
        check_drawable(plot)
    cases = [embedded_case()] if embedded else []
    for name, file, path in zip(models, files, configs, strict=True):
        types: dict[str, Any] = load_config(path).model_dump(
            include={"weight_types", "block_pattern"}
        )
        cases.append(folder_case(name, file, types, allow_missing=allow_missing))
    shares = sizes_of(sizes)
    with using(threads):
        result = bench_quality(
            cases,
            sizes=shares,
            search=search,
            kinds=[kind.strip() for kind in kinds.split(",")],
            seed=seed,
            refine=refine,
            say=note,
        )
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    trained = "no training" if refine is None else "refined on calibration tokens"
    below = [
        f"increase of the loss in nats per token on held-out tokens, {trained}; seed {seed}",
        *(
            f"{name}: {count}, dense {result.dense_loss[name]:.4f}"
            for name, count in result.tokens.items()
        ),
        f"{result.environment}; {result.seconds:.0f} s",
        *([] if plot is None else [f"written to {plot}"]),
    ]
    return Result(result.to_dict(), "\n".join([table(header, rows), "", *below]))


def sizes_of(text: str) -> tuple[float, ...]:
    """The shares that ``--sizes`` names."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < size <= 1 for size in found):
        raise fxshare.errors.ConfigError(
            f"--sizes: expected shares between 0 and 1, comma separated, such as 0.8,0.5; found "
            f"{text!r}"
        )
    return found
