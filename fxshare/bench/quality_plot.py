"""``fxshare bench quality`` as a picture: held-out loss against stored numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.bench.quality import Quality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {"basis sharing": "s", "whitened SVD": "^", "planned": "o"}


def draw(result: Quality, path: Path) -> None:
    """Plot what every method loses against what it stores, a panel for each model; refined plans
    are dashed. Needs the ``viz`` extra."""
    from fxshare.views.figure import write_figure

    write_figure(lambda: _figure(result), path)


def _figure(result: Quality) -> Figure:
    from matplotlib.figure import Figure

    from fxshare.views.figure import PALETTE

    cases = list(dict.fromkeys(row.case for row in result.rows))
    figure = Figure(figsize=(5.2 * max(len(cases), 1), 4), layout="constrained")
    panels = figure.subplots(1, max(len(cases), 1), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=False):
        for method, points in curves(result, case).items():
            plain = method.removesuffix(", refined")
            axes.plot(
                [kept for kept, _ in points],
                [result.dense_loss[case] + increase for _, increase in points],
                marker=_MARKS[plain],
                markersize=4,
                color=PALETTE[list(_MARKS).index(plain)],
                linestyle="-" if method == plain else "--",
                label=method,
            )
        axes.axhline(result.dense_loss[case], color="#BBBBBB", linewidth=0.9, label="dense")
        axes.set_title(case, fontsize=10)
        axes.set_xlabel("stored numbers, of those of the dense weights")
        axes.set_ylabel("held-out loss, nats per token")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def curves(result: Quality, case: str) -> dict[str, list[tuple[float, float]]]:
    """What is kept and the increase of the loss, in order, for every method and every refined
    one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if row.case != case:
            continue
        found.setdefault(row.method, []).append((row.kept, row.increase))
        if row.refined is not None:
            points = found.setdefault(f"{row.method}, refined", [])
            points.append((row.kept, row.refined.increase))
    return {method: sorted(points) for method, points in found.items()}


__all__ = ["curves", "draw"]
