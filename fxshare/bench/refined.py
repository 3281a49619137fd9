"""What refining adds to ``fxshare bench quality``: each plan trained for some minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxshare.refining.refine import refine

METHODS = ("basis sharing", "planned")
"""Whose plans are refined."""
ROWS = 4
"""Windows of a batch."""


@dataclass(frozen=True)
class Refined:
    """A plan after refining, at as many stored numbers as before. ``increase`` is that of the loss
    on the held-out text of the table; ``tokens`` were trained on, in ``seconds`` of wall time."""

    increase: float
    steps: int
    tokens: int
    seconds: float


def refined(
    gm: nn.Module,
    model: nn.Module,
    calibration: Tensor,
    increase: Callable[[nn.Module], float],
    *,
    minutes: float,
    seed: int,
) -> Refined:
    """``gm`` refined on calibration text alone, of which a tenth says which state is the best."""
    batches = list(torch.split(calibration, ROWS))
    result = refine(gm, model, batches, minutes=minutes, seed=seed)
    done = result.fxshare.refined[-1]
    return Refined(increase(result), done.steps, done.tokens, done.seconds)


def columns(found: Sequence[Refined]) -> tuple[list[str], list[str]]:
    """Header and cells of the refined plans of one row, in the order of :data:`METHODS`."""
    header = ["BS refined", "planned refined", "seconds refining", "tokens seen"]
    cells = [f"{one.increase:.4f}" for one in found]
    cells.append(" / ".join(f"{one.seconds:.0f}" for one in found))
    cells.append(" / ".join(f"{one.tokens:,}" for one in found))
    return header, cells


__all__ = ["METHODS", "ROWS", "Refined", "columns", "refined"]
