"""A module as it is compared: in eval mode, in float32 where that tells more."""

from __future__ import annotations

from torch import fx, nn

from fxshare.capture.guards import hold_dtype
from fxshare.capture.steered import set_training
from fxshare.capture.widening import widened
from fxshare.result.module import record_of
from passes.graph.graph import structure_copy


def evaluated(module: nn.Module, half: bool) -> nn.Module:
    """A copy in eval mode to run, on the module's own weights; with ``half`` it computes in
    float32, graphs included, and reads each weight as float32 when it is used."""
    copy = widened(module) if half else structure_copy(module, one_code=True)
    set_training(copy, False)
    return copy


def only_in_its_dtype(gm: nn.Module) -> bool:
    """Whether the graph was traced on a path that the model takes in its own dtype only."""
    graph = gm.graph if isinstance(gm, fx.GraphModule) else fx.Graph()
    holds = any(node.target is hold_dtype for node in graph.nodes)
    return holds and record_of(gm).front_end == "fx"
