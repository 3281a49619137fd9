"""What ``bench scale`` found, for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.base.spent import Spent
from fxshare.bench.scale.measure import METHODS, Method, ScaleRun
from fxshare.bench.scale.run import ScaleBench, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOTAL = "total"
_MARKS = {"planned": "o", "basis sharing": "s", "forward and backward": "^"}


def table(result: ScaleBench) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a stage and a total of each method; for each number of layers the
    processor seconds, and the most memory of the process meanwhile, each beside what was estimated
    before."""
    layers = sorted({run.layers for run in result.runs})
    header = ["shape", "method", "stage"]
    for count in layers:
        header += [f"{counted(count)}: s", "estimated", "GB", "estimated"]
    rows = []
    for shape in dict.fromkeys(run.shape for run in result.runs):
        for method in METHODS:
            runs = {r.layers: r for r in result.runs if (r.shape, r.method) == (shape, method)}
            rows += _rows(shape, method, [runs.get(count) for count in layers])
    return header, rows


def _rows(shape: str, method: Method, runs: Sequence[ScaleRun | None]) -> list[list[str]]:
    stages = [{} if run is None else {one.name: one for one in run.stages} for run in runs]
    names = list(dict.fromkeys(name for some in stages for name in some))
    found = []
    for name in (*names, TOTAL):
        cells = []
        for run, some in zip(runs, stages, strict=True):
            whole = name == TOTAL and run is not None
            one = _total(run) if whole and run is not None else some.get(name)
            cells += _cells(one, run, name)
        found.append([shape, method, name, *cells])
    return found


def _total(run: ScaleRun) -> Spent | None:
    if run.failed:
        return None
    return Spent(TOTAL, 1, run.cpu_seconds, run.seconds, run.peak_bytes)


def _cells(one: Spent | None, run: ScaleRun | None, name: str) -> list[str]:
    """What was measured and estimated of a stage; the memory is estimated of the whole."""
    if one is None or run is None:
        return ["–"] * 4
    said = {each.name: each.seconds for each in run.estimated}
    size = "–"
    if name == TOTAL and said:
        said[TOTAL], size = sum(said.values()), f"{run.estimated_bytes / 1e9:.2f}"
    seconds = f"{said[name]:.2f}" if name in said else "–"
    return [f"{one.cpu_seconds:.2f}", seconds, f"{one.peak_bytes / 1e9:.2f}", size]


def lines_below(result: ScaleBench) -> list[str]:
    """The sizes of the models, planning beside the other methods, how the times grow, what failed,
    and what was measured where."""
    e, s = result.environment, result.settings
    sizes = {(run.shape, run.layers): run.parameters for run in result.runs if run.parameters}
    lines = [f"{shape}, {counted(n)}: {count:,} parameters" for (shape, n), count in sizes.items()]
    lines += [
        f"{one.shape}, {counted(one.layers)}: planned takes {one.times:.2f} times the processor "
        f"seconds of {one.method}"
        for one in result.beside
    ]
    lines += [
        f"{one.shape}, {one.method}: {one.layers[1]} layers take {one.times:.2f} times the "
        f"processor seconds of {one.layers[0]} ({one.layers[1] / one.layers[0]:.2f} times the "
        "layers)"
        for one in result.growth
    ]
    lines += [
        f"failed: {run.shape}, {counted(run.layers)}, {run.method}: {run.failed}"
        for run in result.runs
        if run.failed
    ]
    used = s.tokens // s.length * s.length
    return [
        *lines,
        f"{used:,} random tokens in windows of {s.length}, {s.batch_size} a batch; {s.keep:g} of "
        f"the numbers kept, {s.dtype}, split {s.split}, seed {s.seed}; each run in a process of "
        "its own",
        f"{e['cpu']}, {s.threads or e['threads']} threads, torch {e['torch']}, Python "
        f"{e['python']}, load {e['load']}",
    ]


def draw(result: ScaleBench, path: Path) -> None:
    """Plot processor seconds against layers, both logarithmic; needs the ``viz`` extra."""
    from fxshare.views.figure import write_figure

    write_figure(lambda: _figure(result), path)


def _figure(result: ScaleBench) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter

    from fxshare.views.figure import PALETTE

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shapes = list(dict.fromkeys(run.shape for run in result.runs))
    for number, shape in enumerate(shapes):
        for method in METHODS:
            runs = [r for r in result.runs if (r.shape, r.method) == (shape, method)]
            runs = sorted((r for r in runs if not r.failed), key=lambda run: run.layers)
            if not runs:
                continue
            axes.loglog(
                [run.layers for run in runs],
                [run.cpu_seconds for run in runs],
                marker=_MARKS[method],
                color=PALETTE[number % len(PALETTE)],
                linestyle="-" if method == "planned" else ":",
                label=f"{shape}, {method}",
            )
    counts = sorted({run.layers for run in result.runs})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axes.set_xlabel("layers")
    axes.set_ylabel("processor seconds")
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    return figure


__all__ = ["TOTAL", "draw", "lines_below", "table"]
