"""What refining did to a compiled model: part of its record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Stopped = Literal["done", "rising", "interrupted", "not finite"]
"""Why refining ended: steps or time were used up, the held-out loss rose, Ctrl-C, or the loss was
not finite several times in a row."""


@dataclass(frozen=True)
class Measured:
    """Losses on data kept apart, per token (or per row of an output).

    ``objective`` is what was trained on; ``data_loss`` next-token cross-entropy, None for models
    that predict no tokens.
    """

    objective: float
    data_loss: float | None = None


@dataclass(frozen=True)
class Point:
    """The held-out loss at one moment."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class BlockLoss:
    """The held-out loss of a block that was trained by itself: its output's distance from the dense
    block's."""

    layers: tuple[int, ...]
    steps: int
    before: float
    after: float
    learning_rate: float


@dataclass(frozen=True)
class Refinement:
    """One run of :func:`fxshare.refine`.

    ``before`` and ``after`` are measured on ``held_out`` tokens that were not trained on; ``after``
    is the best state, which is the one kept: that of step ``kept``, 0 for the first.
    ``second_before`` and ``second_after`` are the same on the second corpus, where one was given.
    ``steps`` and ``tokens`` were trained, ``dropped`` of the steps without effect since their loss
    was not finite. ``learning_rate`` is relative to the size of each tensor.
    """

    objective: str
    trained: tuple[str, ...]
    """Kinds of parameters: factors, norms, biases."""
    steps: int
    tokens: int
    seconds: float
    learning_rate: float
    seed: int
    held_out: int
    before: Measured
    after: Measured
    kept: int
    stopped: Stopped
    dropped: int = 0
    second_before: Measured | None = None
    second_after: Measured | None = None
    curve: tuple[Point, ...] = ()
    blocks: tuple[BlockLoss, ...] = ()
    """With ``objective="blocks"``: each block, in the order in which they were trained; the other
    losses are the whole model's."""

    def __str__(self) -> str:
        text = (
            f"refined by {self.objective}: {self.steps:,} steps, {self.tokens:,} tokens, "
            f"{self.seconds:.0f} s; held-out loss {_change(self.before, self.after)} on "
            f"{self.held_out:,} tokens"
        )
        if self.second_before is not None and self.second_after is not None:
            text += f"; on the second corpus {_change(self.second_before, self.second_after)}"
        if self.kept == 0:
            text += "; nothing was better than the first state, which is kept"
        return text


def _change(before: Measured, after: Measured) -> str:
    text = f"{_number(before.objective)} → {_number(after.objective)}"
    if before.data_loss is None or after.data_loss is None:
        return text
    if before.data_loss == before.objective:
        return text
    return f"{text} (nats per token {_number(before.data_loss)} → {_number(after.data_loss)})"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


__all__ = ["BlockLoss", "Measured", "Point", "Refinement", "Stopped"]
