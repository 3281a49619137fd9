"""What a trace may take for a constant, and what it may not."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fxshare.capture.tracing.lines import model_line
from fxshare.errors import CaptureError


def plain_number(value: Any) -> Any:
    """numpy's numbers as Python's, which a graph can hold; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def outside(tensor: Tensor) -> CaptureError:
    """The error for a weight that the model does not know."""
    return CaptureError(
        f"the model reads a weight {tuple(tensor.shape)} at {model_line()} that is not among its "
        "parameters: it is kept in a list, a dict or a closure, or made in forward. Neither a "
        "report nor a saved folder would have it; register it (register_parameter, "
        "nn.ModuleList, nn.ModuleDict), or use capture='modules', which leaves it alone"
    )


__all__ = ["outside", "plain_number"]
