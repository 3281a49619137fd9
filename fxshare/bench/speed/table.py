"""The table and the picture of ``fxshare bench run``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.bench.speed.measuring import Measurement
from fxshare.bench.speed.run import SpeedBench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DENSE, _BAR, _MARK = "#4D4D4D", "#77AADD", "#1A1A1A"


def table(result: SpeedBench) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["step", "mode", "variant", "ms", "IQR", "× dense", "predicted ms", "× dense"]
    return [*header, "MFLOP", "MB weights"], [
        [
            *_place(r),
            _text(r.predicted_seconds, 1e3, 3),
            _text(r.predicted_speedup, 1, 2),
            _text(r.flops, 1e-6, 1),
            _text(r.weight_bytes, 1e-6, 1),
        ]
        for r in result.rows
    ]


def compile_table(result: SpeedBench) -> tuple[list[str], list[list[str]]]:
    """What compiling took: seconds, and how many times those of dense; no rows where nothing was
    compiled."""
    header = ["step", "variant", "compile s", "inductor s", "/ dense", "processor s", "/ dense"]
    return header, [
        [
            r.step,
            r.variant,
            _text(r.compile_seconds, 1, 2),
            _text(r.inductor_seconds, 1, 2),
            _text(r.inductor_ratio, 1, 2),
            _text(r.compile_cpu_seconds, 1, 2),
            _text(r.compile_cpu_ratio, 1, 2),
        ]
        for r in result.rows
        if r.compile_seconds is not None
    ]


def type_table(result: SpeedBench) -> tuple[list[str], list[list[str]]]:
    """The linears of each weight type by themselves; ``of dense`` is what share of the dense
    model's time at this step is theirs."""
    header = ["type", "step", "mode", "variant", "ms", "IQR", "× dense", "of dense", "MFLOP"]
    whole = {(r.step, r.mode): r.seconds for r in result.rows if r.variant == "dense"}
    return header, [
        [
            kind,
            *_place(r),
            f"{r.seconds / whole[r.step, r.mode]:.0%}" if r.variant == "dense" else "",
            _text(r.flops, 1e-6, 1),
        ]
        for kind, rows in result.alone.items()
        for r in rows
    ]


def _place(r: Measurement) -> list[str]:
    seconds = [f"{r.seconds * 1e3:.3f}", f"{r.spread * 1e3:.3f}", f"{r.speedup:.2f}"]
    return [r.step, r.mode, r.variant, *seconds]


def _text(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def lines_below(result: SpeedBench) -> Sequence[str]:
    """What was run, and on what."""
    e = result.environment
    tokens = {r.step: r.tokens for r in result.rows}
    cache = "with a key-value cache" if result.kv_cache else "without a cache"
    where = e["gpu"] if result.device == "cuda" else f"{e['cpu']}, {result.threads} threads"
    return (
        f"{result.model}, {result.dtype}, params_kept {result.params_kept:.3f}; prefill of "
        f"{tokens.get('prefill', 0)} tokens, decode of one {cache}; medians of {result.repeats} "
        f"interleaved rounds{_compilations(result)}",
        f"{where}, torch {e['torch']}, Python {e['python']}, load {e['load']}; "
        f"{result.seconds:.0f} s",
        *(f"note: {note}" for note in result.notes),
    )


def _compilations(result: SpeedBench) -> str:
    if not any(r.compile_seconds is not None for r in result.rows):
        return ""
    return f", {result.compile_repeats} compilations without caches in one process"


def draw(result: SpeedBench, path: Path) -> None:
    """Speed relative to dense, a panel per step and mode, with what was predicted marked."""
    from fxshare.views.figure import check_drawable, write_figure

    check_drawable(path)
    write_figure(lambda: _figure(result), path)


def _figure(result: SpeedBench) -> Figure:
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Measurement]] = {}
    for row in result.rows:
        panels.setdefault((row.step, row.mode), []).append(row)
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((step, mode), rows) in zip(axes, panels.items(), strict=True):
        at = range(len(rows))
        heights = [row.speedup for row in rows]
        colours = [_DENSE if row.variant == "dense" else _BAR for row in rows]
        ax.bar(at, heights, color=colours, width=0.7)
        for x, height in zip(at, heights, strict=True):
            ax.text(x, height, f"{height:.2f}", ha="center", va="bottom", fontsize=8)
        known = [(x, r.predicted_speedup) for x, r in zip(at, rows, strict=True)]
        marks = [(x, y) for x, y in known if y is not None]
        if marks:
            ax.plot(*zip(*marks, strict=True), "_", color=_MARK, markersize=16, label="predicted")
            ax.legend(fontsize=8)
        ax.axhline(1.0, color=_DENSE, linewidth=0.8, linestyle=":")
        ax.set_xticks(list(at), [row.variant for row in rows], rotation=35, ha="right", fontsize=8)
        ax.set_title(f"{step}, {mode}", fontsize=10)
    axes[0].set_ylabel("speed, dense = 1")
    figure.suptitle(f"{result.model}, {result.dtype}, kept {result.params_kept:.2f}", fontsize=10)
    return figure


__all__ = ["compile_table", "draw", "lines_below", "table", "type_table"]
