"""A sweep over budgets as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxshare.plans.outlook import Outlook
from fxshare.views.figure import check_drawable, own_settings, write_drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fxshare.planning.sweep import Sweep


def draw_sweep(sweep: Sweep, path: Path, *, outlook: Outlook | None = None) -> None:
    """Draw predicted loss against what is kept, with the plan that was chosen marked."""
    check_drawable(path)
    with own_settings():
        write_drawing(sweep_figure(sweep, outlook=outlook), path)


# What a budget buys ----------------------------------------------------------------------------


def sweep_figure(sweep: Sweep, *, outlook: Outlook | None = None) -> Figure:
    """Predicted loss against what is kept, the loss on a log scale, and what was measured.

    Points that lose nothing have no place on it and are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for points, label, colour, marker in (
        (sweep.planned, "planned, a point per budget", "#2A6FB0", "o"),
        (sweep.uniform, "every slice alone, the same share", "#8A8A8A", "s"),
    ):
        shown = [point for point in points if point.loss > 0]
        axes.plot(
            [point.kept for point in shown],
            [point.loss for point in shown],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label=label,
        )
    found = [(p.kept, p.measured) for p in sweep.planned if p.measured and p.measured > 0]
    if found:
        axes.plot(
            [kept for kept, _ in found],
            [loss for _, loss in found],
            linestyle="none",
            marker="x",
            markersize=6,
            color="#2A6FB0",
            label="planned, measured on held-back data",
        )
    if outlook is not None:
        at = outlook.cost / sweep.dense
        axes.axvline(outlook.budget / sweep.dense, color="#BBBBBB", linestyle="--", linewidth=0.9)
        for value, label, marker in (
            (outlook.predicted, "the plan, predicted", "D"),
            (outlook.measured, "the plan, measured on held-back data", "*"),
        ):
            if value is not None and value > 0:
                axes.plot(
                    [at], [value], linestyle="none", marker=marker, markersize=9,
                    color="#D1603D", markeredgecolor="white", label=label,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel(f"{_UNITS[sweep.unit]} kept, of those of the dense weights")
    axes.set_ylabel(f"loss increase per token ({sweep.loss_name})")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure


_UNITS = {"numbers": "stored numbers", "bytes": "bytes", "flops": "FLOPs per token"}


__all__ = ["draw_sweep", "sweep_figure"]
