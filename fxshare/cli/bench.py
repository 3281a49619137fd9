"""``fxshare bench``: the benchmarks behind the figures in the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxshare.cli.options import AsJson, Debug, Seed
from fxshare.cli.output import Result, note, reports, table
from fxshare.errors import ConfigError

Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Processor threads; 0 leaves torch's choice.")
]


def _use(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


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
) -> Result:
    """What calibration costs beside a forward pass, and factorisation beside an SVD.

    \b
    Example:
      fxshare bench compress --tokens 8192
    """
    from fxshare.bench.compress import bench_compress, lines

    del as_json, debug
    _use(threads)
    measured = bench_compress(
        layers=layers, width=width, heads=heads, tokens=tokens, repeats=repeats, seed=seed
    )
    return Result(measured.to_dict(), "\n".join(lines(measured)))


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
    search: Annotated[str, typer.Option("--search", help="off, quick or thorough.")] = "quick",
    threads: Threads = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Held-out loss of planned plans beside Basis Sharing and per-matrix SVD; no training.

    \b
    Example:
      fxshare bench quality --sizes 0.8,0.5
      fxshare bench quality --model ./stories --tokens tokens.safetensors -c llama.yaml
    """
    from fxshare.bench.quality import bench_quality, embedded_case, folder_case
    from fxshare.bench.quality import table as rows_of
    from fxshare.config import load_config

    del as_json, debug
    _use(threads)
    models, files, configs = model or [], tokens or [], config or []
    if not len(models) == len(files) == len(configs):
        raise ConfigError(
            f"bench quality: expected one --tokens and one -c for each --model, found "
            f"{len(models)} models, {len(files)} token files, {len(configs)} configurations"
        )
    cases = [embedded_case()] if embedded else []
    for name, file, path in zip(models, files, configs, strict=True):
        types: dict[str, Any] = load_config(path).model_dump(
            include={"weight_types", "block_pattern"}
        )
        cases.append(folder_case(name, file, types))
    result = bench_quality(cases, sizes=_sizes(sizes), search=search, seed=seed, say=note)
    header, rows = rows_of(result)
    below = [
        f"increase of the loss in nats per token on held-out tokens, no training; seed {seed}",
        *(
            f"{name}: {count}, dense {result.dense_loss[name]:.4f}"
            for name, count in result.tokens.items()
        ),
        f"{result.environment}; {result.seconds:.0f} s",
    ]
    return Result(result.to_dict(), "\n".join([table(header, rows), "", *below]))


def _sizes(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < size <= 1 for size in found):
        raise ConfigError(
            f"--sizes: expected shares between 0 and 1, comma separated, such as 0.8,0.5; found "
            f"{text!r}"
        )
    return found


def planner(
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers of layers, comma separated.")
    ] = "4,8,16,32,80",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw time against sites.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """How long planning takes on Llama-7B-shaped problems with given spectra.

    \b
    Example:
      fxshare bench planner --layers 32 --plot planner.svg
    """
    from fxshare.bench.planner import bench_planner, draw
    from fxshare.bench.planner import table as rows_of

    del as_json, debug
    try:
        counts = [int(part) for part in layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers: expected numbers such as 8,32; found {layers!r}") from None
    result = bench_planner(counts)
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    return Result(result.to_dict(), "\n".join([table(header, rows), "", str(result.environment)]))


def bench_app() -> typer.Typer:
    """The ``bench`` group."""
    app = typer.Typer(
        name="bench",
        help="Benchmarks: ratios within one run, medians, and the machine they ran on.",
        rich_markup_mode=None,
        no_args_is_help=True,
    )
    app.command("compress")(reports(compress))
    app.command("quality")(reports(quality))
    app.command("planner")(reports(planner))
    return app
