"""``fxshare bench frontier`` as a picture: held-out loss against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.bench.frontier_table import EVERYTHING, Frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-5
"""On a logarithmic scale, what loses nothing, or less than that."""


def draw(result: Frontier, path: Path) -> None:
    """Plot what every method loses against its bytes, a panel for each model, both axes
    logarithmic. Needs the ``viz`` extra."""
    from fxshare.views.figure import write_figure

    write_figure(lambda: _figure(result), path)


def _figure(result: Frontier) -> Figure:
    from matplotlib.figure import Figure

    from fxshare.views.figure import PALETTE

    cases = list(result.dense_loss)
    figure = Figure(figsize=(5.2 * max(len(cases), 1), 4), layout="constrained")
    panels = figure.subplots(1, max(len(cases), 1), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=False):
        for number, (method, points) in enumerate(curves(result, case).items()):
            axes.loglog(
                [kept for kept, _ in points],
                [max(increase, _LEAST) for _, increase in points],
                marker="o" if len(points) > 1 else "s",
                markersize=4,
                color="black" if method == EVERYTHING else PALETTE[number % len(PALETTE)],
                linewidth=1.8 if method == EVERYTHING else 1.0,
                label=method,
            )
        axes.set_title(case, fontsize=10)
        axes.set_xlabel("bytes in the file, of those of the matched weights in bfloat16")
        axes.set_ylabel("held-out loss above dense")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def curves(result: Frontier, case: str) -> dict[str, list[tuple[float, float]]]:
    """The share of the bytes and the increase of the loss, in order, for every method."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if row.case == case:
            found.setdefault(row.method, []).append((row.kept, row.increase))
    return {method: sorted(points) for method, points in found.items()}


__all__ = ["curves", "draw"]
