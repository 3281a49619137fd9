"""``fxshare bench device``."""

from __future__ import annotations

from typing import Annotated

import typer

import fxshare
from fxshare.cli.options import AllowMissing, AsJson, Debug, Device, Dtype, Quiet, Threads, Verbose
from fxshare.cli.output import Result, table


def device(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Measure its products too, as for 'fxshare compile'."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="D,LAYERS,HEADS,FFN", help="A GPT with random weights for MODEL."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", metavar="N,...", help="With MODEL: sequences at a time.", show_default="1"
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt",
            min=2,
            metavar="T",
            help="With MODEL: tokens of the prompt.",
            show_default="512",
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 15,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Measure under torch.compile too.")
    ] = True,
    threads: Threads = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Measure this device for the cost model: FLOP/s, bandwidth, launches. Kept in the cache.

    \b
    Example:
      fxshare bench device --threads 1
      fxshare bench device embedded --batch 1,8 --prompt 256 --threads 1
    """
    from fxshare.bench.speed.device import bench_device, device_of_name, dtype_of_name
    from fxshare.bench.speed.device import table as rows_of
    from fxshare.bench.speed.device import threads as using
    from fxshare.bench.speed.shapes import measured_shapes, with_shapes
    from fxshare.bench.speed.subject import GPTShape, random_gpt
    from fxshare.cost_model import PREFILL, write_rates
    from fxshare.cost_model.device import rates_for
    from fxshare.cost_model.measured import Measured
    from fxshare.loading.names import load_model

    del as_json, debug, verbose, quiet
    place, kind = device_of_name(device), dtype_of_name(dtype)
    batches, tokens = _counts(batch or "1"), PREFILL if prompt is None else prompt
    if model is not None and shape is not None:
        raise fxshare.errors.ConfigError(
            "--shape: makes a model of its own, found MODEL beside it; give one"
        )
    for option, given in (("--batch", batch), ("--prompt", prompt)):
        if given is not None and model is None and shape is None:
            raise fxshare.errors.ConfigError(
                f"{option}: is of the products of a model; give MODEL or --shape, or leave it out"
            )
    named = None if model is None else load_model(model, allow_missing=allow_missing).model
    if shape is not None:
        named = random_gpt(GPTShape.parse(shape), context=tokens, vocabulary=256, seed=0)
    with using(threads):
        rates = bench_device(device=device, dtype=dtype, repeats=repeats, compiled=compiled)
        found = Measured()
        if named is not None:
            found = measured_shapes(
                named,
                device=device,
                dtype=dtype,
                prompt=tokens,
                batches=batches,
                repeats=repeats,
                launch=rates.launch,
            )
        rates = with_shapes(rates, found, rates_for(place, kind))
    path = write_rates(rates)
    header, rows = rows_of(rates)
    what = f"{rates.name}, {rates.dtype}, {rates.threads} threads, torch {rates.torch}"
    return Result(rates.to_dict(), f"{what}\n{table(header, rows)}\nwritten to {path}")


def _counts(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise fxshare.errors.ConfigError(
            f"--batch: expected numbers from 1 such as 1,8; found {text!r}"
        )
    return found
