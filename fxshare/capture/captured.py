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

FrontEnd = Literal["fx", "export", "modules"]
Mode = Literal["auto", "fx", "export", "modules"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    ``graph`` is what passes rewrite; for the modules front end it is all linears side by side.
    ``shapes`` are the calls it was checked on; ``relaxed`` the numbers of the guards that proved
    harmless; ``error`` the largest relative difference from the original in the self-check, None
    where nothing was run (meta device, modules).
    """

    front_end: FrontEnd
    graph: fx.GraphModule
    shapes: Shapes | None
    relaxed: tuple[int, ...]
    error: float | None
    notes: tuple[str, ...]
    seconds: float


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 where it has none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


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


__all__ = ["Captured", "FrontEnd", "Mode", "device_of", "dtype_of", "quiet"]
