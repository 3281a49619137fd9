"""``fxshare bench run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Debug,
    Device,
    Dtype,
    Original,
    Quiet,
    Seed,
    Threads,
    Verbose,
)
from fxshare.cli.output import Result, note, table

if TYPE_CHECKING:
    from fxshare.bench.speed.run import SpeedBench
    from fxshare.bench.speed.subject import Subject


def run(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="As for 'fxshare compile'.")
    ] = "embedded",
    shape: Annotated[
        str | None,
        typer.Option(metavar="D,LAYERS,HEADS,FFN", help="A GPT with random weights instead."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="Weight types of another model."),
    ] = None,
    kept: Annotated[
        float | None, typer.Option("--kept", metavar="SHARE", help="Of every matrix. [0.5]")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="plain, pivoted, units, int8, int4. [plain]")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="heads, qkv or false. [heads]")
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option("--basis", help="What pools into one: slice, part or site. [site]"),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Layers that share a basis. [1]")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Compress linears of these names alone. [all]"),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="With --shape: q, k and v as linears of their own.")
    ] = False,
    by_type: Annotated[
        bool,
        typer.Option("--by-type", help="Measure the linears of each weight type alone as well."),
    ] = False,
    variants: Annotated[
        str | None,
        typer.Option(help="dense, exact, exact-lowered, notebook, readable, lowered. [all]"),
    ] = None,
    modes: Annotated[str, typer.Option(help="eager, compiled, or both.")] = "eager,compiled",
    compile_mode: Annotated[
        str, typer.Option(help="default, reduce-overhead or max-autotune.")
    ] = "default",
    compile_repeats: Annotated[
        int,
        typer.Option("--compile-repeats", min=1, metavar="N", help="Compilations of each variant."),
    ] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 7,
    prefill: Annotated[
        int, typer.Option("--prefill", min=2, metavar="T", help="Tokens of the prompt.")
    ] = 512,
    batch: Annotated[
        int, typer.Option("--batch", min=1, metavar="N", help="Sequences at a time. [1]")
    ] = 1,
    vocabulary: Annotated[
        int, typer.Option(min=2, metavar="V", help="With --shape; the head counts in every figure.")
    ] = 256,
    original: Original = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the speeds: .svg, .png, ...")
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """How fast a compressed model is beside dense: eager and compiled, a prompt and one token.

    \b
    Examples:
      fxshare bench run --threads 1
      fxshare bench run --shape 1024,4,16,4096 --variants lowered --modes compiled --threads 1
      fxshare bench run --shape 1024,4,16,4096 --only '.*c_attn$' --by-type --threads 1
      fxshare bench run out/ --plot speed.svg
    """
    from fxshare.bench.speed.device import device_of_name, dtype_of_name
    from fxshare.bench.speed.device import threads as using
    from fxshare.bench.speed.measuring import COMPILE_MODES, MODES, Timing
    from fxshare.bench.speed.run import VARIANTS, available, bench_run, chosen
    from fxshare.bench.speed.subject import GPTShape, Settings, named_subject, shape_subject
    from fxshare.bench.speed.table import draw
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    if plot is not None:
        check_drawable(plot)
    wanted = None if variants is None else chosen(variants, VARIANTS, "--variants")
    timing = Timing(
        modes=chosen(modes, MODES, "--modes"),
        repeats=repeats,
        prefill=prefill,
        compile_mode=chosen(compile_mode, COMPILE_MODES, "--compile-mode")[0],
        compile_repeats=compile_repeats,
        seed=seed,
        batch=batch,
    )
    place, kind = device_of_name(device), dtype_of_name(dtype)
    given = _given(
        kept=kept, storage=storage, split=split, basis=basis, group_size=group_size, only=only
    )
    settings = Settings(**given, separate=separate)
    _go_together(by_type=by_type, batch=batch, separate=separate, shape=shape)
    with using(threads):
        if shape is None:
            subject: Subject = named_subject(
                model,
                settings if given else None,
                configs=config or (),
                original=original,
                allow_missing=allow_missing,
                dtype=kind,
                device=place,
                seed=seed,
            )
        else:
            _shape_alone(model, config, original)
            subject = shape_subject(
                GPTShape.parse(shape),
                settings,
                dtype=kind,
                device=place,
                context=prefill,
                vocabulary=vocabulary,
                seed=seed,
            )
        result = bench_run(
            subject,
            timing,
            variants=available(subject) if wanted is None else wanted,
            by_type=by_type,
            say=note,
        )
    if plot is not None:
        draw(result, plot)
    return Result(result.to_dict(), _text(result, plot))


def _go_together(*, by_type: bool, batch: int, separate: bool, shape: str | None) -> None:
    if by_type and batch > 1:
        raise fxshare.errors.ConfigError("--by-type: measures one sequence; leave --batch out")
    if separate and shape is None:
        raise fxshare.errors.ConfigError("--separate: is of the GPT that --shape makes; give one")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _text(result: SpeedBench, plot: Path | None) -> str:
    from fxshare.bench.speed.table import compile_table, lines_below, type_table
    from fxshare.bench.speed.table import table as rows_of

    tables = [(*rows_of(result), 3), (*compile_table(result), 2), (*type_table(result), 4)]
    shown = [table(header, rows, left=left) + "\n" for header, rows, left in tables if rows]
    below = [] if plot is None else [f"written to {plot}"]
    return "\n".join([*shown, *lines_below(result), *below])


def _shape_alone(model: str, config: list[Path] | None, original: str | None) -> None:
    for option, value in (("MODEL", model if model != "embedded" else None), ("-c", config)):
        if value:
            raise fxshare.errors.ConfigError(
                f"--shape: makes a model of its own, found {option} beside it; give one of the two"
            )
    if original is not None:
        raise fxshare.errors.ConfigError(
            "--original: names the model that a saved folder was made from"
        )
