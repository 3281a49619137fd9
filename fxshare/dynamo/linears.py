"""The linears of the graphs that dynamo makes, in which parameters are inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_LINEARS = (F.linear, torch._C._nn.linear)
_STEP = re.compile(r"\._modules\['([^']*)'\]")
_PARAMETER = re.compile(r"\._parameters\['([^']*)'\]$")


@dataclass(frozen=True, eq=False)
class DynamoLinear:
    """A node of dynamo's graph that computes ``input @ weight_OI.T + bias`` over a parameter, its
    input number ``at``; ``name`` is the module as dynamo reached it."""

    node: fx.Node
    at: int
    name: str
    input: fx.Node
    weight_OI: Tensor


def linears_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[DynamoLinear]:
    """Every linear over a module's weight, in the order of the graph."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = dict(zip(inputs, example_inputs, strict=True))
    at = {node: number for number, node in enumerate(inputs)}
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _LINEARS:
            named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
            x, weight = named["input"], named["weight"]
        elif node.target is torch.addmm and len(node.args) == 3 and not node.kwargs:
            _, x, weight = node.args
        else:
            continue
        name = _module_name(weight)
        stored = given.get(weight)
        if name is None or not isinstance(stored, Tensor) or not isinstance(x, fx.Node):
            continue
        stored = stored.detach()
        weight_OI = stored.t() if node.target is torch.addmm else stored
        found.append(DynamoLinear(node, at[weight], name, x, weight_OI))
    return found


def parameters_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[tuple[str, int]]:
    """The names of the parameters that a graph reads, as dynamo reached them, and their sizes."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    found = []
    for node, value in zip(inputs, example_inputs, strict=True):
        source = _source(node)
        own = _PARAMETER.search(source)
        if own is not None and isinstance(value, Tensor):
            found.append((".".join([*_STEP.findall(source), own[1]]), value.numel()))
    return found


def _module_name(weight: object) -> str | None:
    """``h.0.c_fc`` of an input that dynamo took from ``L['self']._modules['h']…``."""
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return None
    text = _source(weight)
    if not text.endswith("._parameters['weight']"):
        return None
    return ".".join(_STEP.findall(text))


def _source(node: fx.Node) -> str:
    """Where dynamo took an input from; nothing where it does not say."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = getattr(source, "name", None)
    text = text() if callable(text) else text
    return text if isinstance(text, str) else ""


def keep_sources(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What dynamo says of its inputs beside ``meta``, which copying a graph loses."""
    for a, b in zip(old.graph.nodes, new.graph.nodes, strict=False):
        if a.op != "placeholder":
            break
        source = getattr(a, "_dynamo_source", None)
        if source is not None:
            b._dynamo_source = source
