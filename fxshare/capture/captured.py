"""What capture hands on: a graph, how it was made, and the calls it was checked on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import fx, nn

from fxshare.capture.call import Shapes
from fxshare.capture.caller import Caller

FrontEnd = Literal["fx", "export", "modules"]
Mode = Literal["auto", "fx", "export", "modules"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    ``model`` is what was captured; ``graph`` is what passes rewrite, for the modules front end all
    linears side by side. ``shapes`` are the calls it was checked on; ``relaxed`` the numbers of the
    guards that proved harmless; ``error`` the largest relative difference from the original in the
    self-check, None where nothing was run (meta device, modules).
    """

    model: nn.Module
    front_end: FrontEnd
    graph: fx.GraphModule
    shapes: Shapes | None
    relaxed: tuple[int, ...]
    error: float | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def caller(self) -> Caller:
        """Makes a call of a batch: ``captured.caller(batch)``. Labels stay in it where the capture
        saw them."""
        return Caller(self.model, () if self.shapes is None else tuple(self.shapes.base))


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, and the random number generators as before afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


__all__ = ["Captured", "FrontEnd", "Mode", "quiet"]
