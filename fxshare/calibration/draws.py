"""What is drawn for a batch (sampled labels, a projection of the output): of several processes each
draws what one process would have drawn for its batches.

All start from one seed. Before a rank draws for its batch of a round, it is told what those before
it draw for theirs, and draws as much to no purpose.
"""

from __future__ import annotations

from typing import Any

import torch

from fxshare.base.processes import here
from fxshare.calibration.distance import output_rows
from fxshare.calibration.losses import Labels, next_token_logits
from fxshare.capture.call import Call

Draw = tuple[bool, tuple[int, ...], torch.dtype]
"""Whether labels are sampled from rows, else normal numbers; of which shape and dtype."""


class Draws:
    """The generator of a pass over the data."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._after: list[Draw] = []

    def turn(self, output: Any, call: Call, labels: Labels) -> torch.Generator:
        """The generator, to draw for this batch."""
        if here().size > 1:
            with torch.no_grad():
                self._wait(_draws(output, call, labels))
        return self._generator

    def complete(self, batches: int) -> None:
        """Take part in the last round, for which there may not have been a batch."""
        together = here()
        if together.rank >= (batches % together.size or together.size):
            self._wait([])

    def _wait(self, own: list[Draw]) -> None:
        together = here()
        everybody = together.gather(own, "what is drawn")
        before = [draw for one in everybody[: together.rank] for draw in one]
        for draw in (*self._after, *before):
            _drawn(draw, self._generator)
        self._after = [draw for one in everybody[together.rank + 1 :] for draw in one]


def _draws(output: Any, call: Call, labels: Labels) -> list[Draw]:
    """What :func:`fxshare.calibration.losses.default_loss` draws."""
    found = next_token_logits(output, call)
    if found is None:
        return [(False, tuple(rows.shape), rows.dtype) for rows in output_rows(output, call)]
    if labels != "sampled":
        return []
    rows, length, vocabulary = found[0].shape
    wide = torch.promote_types(found[0].dtype, torch.float32)
    return [(True, (rows * (length - 1), vocabulary), wide)]


def _drawn(draw: Draw, generator: torch.Generator) -> None:
    sampled, shape, dtype = draw
    if sampled:
        even = torch.ones((), dtype=dtype, device="cpu").expand(shape).contiguous()
        torch.multinomial(even, 1, generator=generator)
    else:
        torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


__all__ = ["Draws"]
