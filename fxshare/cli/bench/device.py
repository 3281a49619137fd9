"""``fxshare bench device``."""

from __future__ import annotations

from typing import Annotated

import typer

from fxshare.cli.options import AsJson, Debug, Device, Dtype, Quiet, Threads, Verbose
from fxshare.cli.output import Result, table


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
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Measure this device for the cost model: FLOP/s, bandwidth, launches. Kept in the cache.

    \b
    Example:
      fxshare bench device --threads 1
    """
    from fxshare.bench.speed.device import bench_device
    from fxshare.bench.speed.device import table as rows_of
    from fxshare.bench.speed.device import threads as using
    from fxshare.cost_model import write_rates

    del as_json, debug, verbose, quiet
    with using(threads):
        rates = bench_device(device=device, dtype=dtype, repeats=repeats, compiled=compiled)
    path = write_rates(rates)
    header, rows = rows_of(rates)
    what = f"{rates.name}, {rates.dtype}, {rates.threads} threads, torch {rates.torch}"
    return Result(rates.to_dict(), f"{what}\n{table(header, rows)}\nwritten to {path}")
