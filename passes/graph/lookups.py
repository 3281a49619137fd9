"""Nodes that look rows of a weight up: embeddings.

A linear multiplies by a weight ``(V, I)``; a lookup reads its rows ``(..., I)`` by their numbers.
One weight may have readers of both kinds: an embedding, and the output projection tied to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.graph.graph import calls_by_target
from passes.graph.operands import operand_of

_FUNCTIONS = (F.embedding, torch.embedding, torch.ops.aten.embedding.default)
_KEYS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class Lookup:
    """One node that reads rows of a weight by their numbers.

    ``name`` is the qualified name of the module whose ``weight`` it reads, ``ids`` the node of the
    row numbers ``(...)``; ``padding_idx`` is the row that gets no gradient, None for none.
    """

    node: fx.Node
    name: str
    ids: fx.Node
    weight_VI: Tensor
    padding_idx: int | None


def is_embedding(module: nn.Module) -> bool:
    """Whether ``module`` holds a weight whose rows it looks up, perhaps with something after."""
    return isinstance(module, nn.Embedding)


def lookup_refusal(module: nn.Module) -> str | None:
    """Why the lookups of an embedding cannot be rewritten; None where they can."""
    if getattr(module, "max_norm", None) is not None:
        return "renormalises the rows that it reads (max_norm), which writes into its weight"
    if getattr(module, "sparse", False) or getattr(module, "scale_grad_by_freq", False):
        return "has gradients of its own (sparse or scale_grad_by_freq), which factors have not"
    return None


def lookups(gm: fx.GraphModule) -> list[Lookup]:
    """Every lookup of the graph, in execution order, whether of a module or a function."""
    found = (_lookup(gm, node) for node in gm.graph.nodes)
    return [one for one in found if one is not None]


def look_up(graph: fx.Graph, ids: fx.Node, weight: str, padding_idx: int | None) -> fx.Node:
    """Nodes that read rows of the tensor at the dotted name ``weight``; returns the last."""
    padding: dict[str, Any] = {} if padding_idx is None else {"padding_idx": padding_idx}
    return graph.call_function(F.embedding, (ids, graph.get_attr(weight)), padding)


def only_called(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls of every linear whose weight nothing reads without calling it, by its name: what
    may be put together with others, or take another form."""
    reads = (str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and n.users)
    read = {target.rpartition(".")[0] for target in reads}
    calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
    return {name: nodes for name, nodes in calls.items() if name not in read}


def _lookup(gm: fx.GraphModule, node: fx.Node) -> Lookup | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) is not nn.Embedding or lookup_refusal(module) is not None:
            return None
        given = [*node.args, *node.kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], fx.Node):
            return None
        return Lookup(node, str(node.target), given[0], module.weight, module.padding_idx)
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    return _function(gm, node)


def _function(gm: fx.GraphModule, node: fx.Node) -> Lookup | None:
    ids_first = node.target is F.embedding
    names = ("input", "weight") if ids_first else ("weight", "indices")
    keys = _KEYS if ids_first else ("padding_idx", "scale_grad_by_freq", "sparse")
    given: dict[str, Any] = dict(zip((*names, *keys), node.args, strict=False)) | dict(node.kwargs)
    ids = given.get("input" if ids_first else "indices")
    read = operand_of(gm, given.get("weight"))
    padding_idx = given.get("padding_idx")
    plain = not any(given.get(key) for key in ("max_norm", "scale_grad_by_freq", "sparse"))
    if read is None or read.transposed or read.rows is not None or not plain:
        return None
    if not isinstance(ids, fx.Node) or read.tensor.ndim != 2:
        return None
    if not isinstance(padding_idx, int | None):
        return None
    if padding_idx is not None and padding_idx < 0:
        # aten says -1 where there is none; torch's own function counts from the end
        padding_idx = padding_idx + len(read.tensor) if ids_first else None
    return Lookup(node, read.name, ids, read.tensor, padding_idx)
