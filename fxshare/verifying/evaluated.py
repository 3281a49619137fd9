"""A module as it is compared: in eval mode, in float32 where that tells more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fxshare.capture import Call
from fxshare.capture.guards import hold_dtype
from fxshare.capture.steered import set_training
from fxshare.result.module import record_of
from fxshare.verifying.widening import widen
from passes.graph.graph import structure_copy


def evaluated(module: nn.Module, half: bool) -> nn.Module:
    """A copy in eval mode to run, on the module's own weights; with ``half`` it computes in
    float32, graphs included, and reads each weight as float32 when it is used."""
    copy = structure_copy(module, one_code=not half)
    set_training(copy, False)
    for m in copy.modules():
        if half and isinstance(m, fx.GraphModule):
            cast_to_float32(m)
    if half:
        widen(copy)
    return copy


def as_float32(call: Call) -> Call:
    """A call whose numbers are in float32, for such a copy."""
    return {
        k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


def only_in_its_dtype(gm: nn.Module) -> bool:
    """Whether the graph was traced on a path that the model takes in its own dtype only."""
    graph = gm.graph if isinstance(gm, fx.GraphModule) else fx.Graph()
    holds = any(node.target is hold_dtype for node in graph.nodes)
    return holds and record_of(gm).front_end == "fx"


def cast_to_float32(gm: fx.GraphModule) -> None:
    """Dtypes that are constants of the graph, as torch.export makes them, become float32."""

    def wider(leaf: Any) -> Any:
        return torch.float32 if leaf in (torch.float16, torch.bfloat16) else leaf

    for node in list(gm.graph.nodes):
        if node.target is hold_dtype:
            gm.graph.erase_node(node)
            continue
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), wider)
    gm.recompile()
