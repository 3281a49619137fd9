"""A module as it is compared: in eval mode, in float32 where that tells more."""

from __future__ import annotations

from torch import nn

from fxshare.capture.steered import set_training
from fxshare.capture.widening import widened
from passes.graph.graph import structure_copy


def evaluated(module: nn.Module, half: bool) -> nn.Module:
    """A copy in eval mode to run, on the module's own weights; with ``half`` it computes in
    float32, graphs included, and reads each weight as float32 when it is used."""
    copy = widened(module) if half else structure_copy(module, one_code=True)
    set_training(copy, False)
    return copy
