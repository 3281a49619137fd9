"""The held-out loss while a model was refined, as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.result.refinement import Refinement
from fxshare.views.figure import check_drawable, own_settings, write_drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curve(done: Refinement, path: Path) -> None:
    """Draw the held-out loss against seconds, with the state that was kept marked."""
    check_drawable(path)
    with own_settings():
        write_drawing(curve_figure(done), path)


def curve_figure(done: Refinement) -> Figure:
    """The loss on a log scale; measurements that were not finite have no place on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    points = [(0.0, done.before.objective), *((p.seconds, p.loss) for p in done.curve)]
    shown = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
    axes.plot(
        [x for x, _ in shown],
        [y for _, y in shown],
        color="#2A6FB0",
        marker="o",
        markersize=3.5,
        linewidth=1.4,
        label="on held-out data",
    )
    at = next((p.seconds for p in done.curve if p.step == done.kept), 0.0)
    if done.after.objective > 0:
        axes.plot(
            [at], [done.after.objective], linestyle="none", marker="*", markersize=11,
            color="#D1603D", markeredgecolor="white", label="the state that is kept",
        )  # fmt: skip
    if shown:
        axes.set_yscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"loss ({done.objective})")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure


__all__ = ["curve_figure", "draw_curve"]
