"""``fxshare bench``: the benchmarks behind the figures in the documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.options import AsJson, Debug, Original, Seed
from fxshare.cli.output import Result, note, reports, table

if TYPE_CHECKING:
    from fxshare.bench.subject import Subject

Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Processor threads; 0 leaves torch's choice.")
]


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
    from fxshare.bench.device import threads as using

    del as_json, debug
    with using(threads):
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
    from fxshare.bench.device import threads as using
    from fxshare.bench.quality import bench_quality, embedded_case, folder_case
    from fxshare.bench.quality import table as rows_of
    from fxshare.config import load_config

    del as_json, debug
    models, files, configs = model or [], tokens or [], config or []
    if not len(models) == len(files) == len(configs):
        raise fxshare.errors.ConfigError(
            f"bench quality: expected one --tokens and one -c for each --model, found "
            f"{len(models)} models, {len(files)} token files, {len(configs)} configurations"
        )
    cases = [embedded_case()] if embedded else []
    for name, file, path in zip(models, files, configs, strict=True):
        types: dict[str, Any] = load_config(path).model_dump(
            include={"weight_types", "block_pattern"}
        )
        cases.append(folder_case(name, file, types))
    shares = _sizes(sizes)
    with using(threads):
        result = bench_quality(cases, sizes=shares, search=search, seed=seed, say=note)
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
        raise fxshare.errors.ConfigError(
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
        raise fxshare.errors.ConfigError(
            f"--layers: expected numbers such as 8,32; found {layers!r}"
        ) from None
    result = bench_planner(counts)
    if plot is not None:
        draw(result, plot)
    header, rows = rows_of(result)
    return Result(result.to_dict(), "\n".join([table(header, rows), "", str(result.environment)]))


Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]


def device(
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 15,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Measure under torch.compile too.")
    ] = True,
    threads: Threads = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Measure this device for the cost model: FLOP/s, bandwidth, launches. Kept in the cache.

    \b
    Example:
      fxshare bench device --threads 1
    """
    from fxshare.bench.device import bench_device
    from fxshare.bench.device import table as rows_of
    from fxshare.bench.device import threads as using
    from fxshare.cost_model import write_rates

    del as_json, debug
    with using(threads):
        rates = bench_device(device=device, dtype=dtype, repeats=repeats, compiled=compiled)
    path = write_rates(rates)
    header, rows = rows_of(rates)
    what = f"{rates.name}, {rates.dtype}, {rates.threads} threads, torch {rates.torch}"
    return Result(rates.to_dict(), f"{what}\n{table(header, rows)}\nwritten to {path}")


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
        str | None, typer.Option("--storage", help="plain or pivoted. [plain]")
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """How fast a compressed model is beside dense: eager and compiled, a prompt and one token.

    \b
    Examples:
      fxshare bench run --threads 1
      fxshare bench run --shape 1024,4,16,4096 --variants lowered --modes compiled --threads 1
      fxshare bench run --shape 1024,4,16,4096 --only '.*c_attn$' --by-type --threads 1
      fxshare bench run out/ --plot speed.svg
    """
    from fxshare.bench.device import device_of_name, dtype_of_name
    from fxshare.bench.device import threads as using
    from fxshare.bench.run import COMPILE_MODES, MODES, VARIANTS, available, bench_run, chosen
    from fxshare.bench.speed_table import compile_table, draw, lines_below, type_table
    from fxshare.bench.speed_table import table as rows_of
    from fxshare.bench.subject import GPTShape, Settings, named_subject, shape_subject
    from fxshare.drawing import check_drawable

    del as_json, debug
    if plot is not None:
        check_drawable(plot)
    wanted = None if variants is None else chosen(variants, VARIANTS, "--variants")
    ways = chosen(modes, MODES, "--modes")
    (mode,) = chosen(compile_mode, COMPILE_MODES, "--compile-mode")[:1]
    place, kind = device_of_name(device), dtype_of_name(dtype)
    options = {
        "kept": kept,
        "storage": storage,
        "split": split,
        "basis": basis,
        "group_size": group_size,
        "only": only,
    }
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings(**given)  # type: ignore[arg-type]
    with using(threads):
        if shape is None:
            subject: Subject = named_subject(
                model,
                settings if given else None,
                configs=config or (),
                original=original,
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
            variants=available(subject) if wanted is None else wanted,
            modes=ways,
            repeats=repeats,
            prefill=prefill,
            compile_mode=mode,
            compile_repeats=compile_repeats,
            by_type=by_type,
            say=note,
            seed=seed,
        )
    below = list(lines_below(result))
    if plot is not None:
        draw(result, plot)
        below.append(f"written to {plot}")
    tables = [(*rows_of(result), 3), (*compile_table(result), 2), (*type_table(result), 4)]
    shown = [table(header, rows, left=left) + "\n" for header, rows, left in tables if rows]
    return Result(result.to_dict(), "\n".join([*shown, *below]))


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


def capture(
    family: Annotated[
        str, typer.Option(metavar="NAME", help="llama, qwen3, gemma, phi3 or neox.")
    ] = "llama",
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Default: the family's own.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Seconds and memory to capture and rewrite a model of 7B shape without weights.

    \b
    Example:
      fxshare bench capture --family qwen3
    """
    from fxshare.bench.capture import bench_capture, lines
    from fxshare.bench.capture import family as model_of

    del as_json, debug
    found = bench_capture(lambda: model_of(family, layers))
    return Result(found.to_dict(), "\n".join(lines(found)))


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
) -> Result:
    """Tokens per second of generate(): the graph, lowered, beside module granularity and dense.

    \b
    Example:
      fxshare bench generate --threads 1
    """
    from fxshare.bench.device import threads as using
    from fxshare.bench.generate import bench_generate, llama
    from fxshare.bench.generate import table as rows_of
    from fxshare.bench.subject import GPTShape

    del as_json, debug
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
    app.command("device")(reports(device))
    app.command("run")(reports(run))
    app.command("capture")(reports(capture))
    app.command("generate")(reports(generate))
    return app
