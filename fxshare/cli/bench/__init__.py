"""``fxshare bench``: the benchmarks behind the figures in the documents."""

from __future__ import annotations

import typer

from fxshare.cli.bench.capture import capture
from fxshare.cli.bench.compress import compress
from fxshare.cli.bench.device import device
from fxshare.cli.bench.encoder import encoder
from fxshare.cli.bench.frontier import frontier
from fxshare.cli.bench.generate import generate
from fxshare.cli.bench.planner import planner
from fxshare.cli.bench.quality import quality
from fxshare.cli.bench.run import run
from fxshare.cli.bench.scale import scale
from fxshare.cli.output import reports


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
    app.command("frontier")(reports(frontier))
    app.command("encoder")(reports(encoder))
    app.command("planner")(reports(planner))
    app.command("device")(reports(device))
    app.command("run")(reports(run))
    app.command("capture")(reports(capture))
    app.command("generate")(reports(generate))
    app.command("scale")(reports(scale))
    return app
