"""A graph that keeps little for its backward pass: what goes from one stretch of layers to the
next. What is inside a stretch is computed again when its gradient is (Chen et al. 2016, "Training
deep nets with sublinear memory cost")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxshare.base.memory import free, shown
from fxshare.capture import Call
from fxshare.capture.stretches import GraphCopy
from fxshare.errors import RefineError
from fxshare.refining.cuts import bounds_of
from fxshare.refining.student import Student
from passes.graph.modes import modes_of
from passes.graph.writes import is_in_place, sharing_memory

_LOG = logging.getLogger(__name__)
_OTHERWISE = "take offload=True, which writes activations to a file"


def recomputed(student: Student) -> nn.Module:
    """The student's module, cut between its layers: outputs and gradients are the same, bit for
    bit, for the time of a second forward pass.

    Raises :class:`RefineError` for what is no graph of layers, and for one that writes into the
    model's own tensors.
    """
    gm = student.module
    if not isinstance(student.gm, fx.GraphModule) or not isinstance(gm, fx.GraphModule):
        raise RefineError(
            "recompute: the model was captured at module granularity, and only a graph can be cut "
            f"between its layers; {_OTHERWISE}"
        )
    nodes = list(gm.graph.nodes)
    bounds = _whole(gm.graph, bounds_of(student.gm, student.trainable))
    if len(bounds) < 2:
        raise RefineError(
            "recompute: the graph cannot be cut between its layers, over which it writes or sets "
            f"modes (autocast, gradients); {_OTHERWISE}"
        )
    top = GraphCopy(gm)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        inside = [node for node in nodes[start:stop] if node.op not in ("placeholder", "get_attr")]
        for node in nodes[start:stop]:
            if node.op == "placeholder":
                top.copy(node)
        top.stretch(f"stretch_{number}", inside)
    for node in nodes[bounds[-1] :]:
        if node.op != "get_attr":
            top.copy(node)
    made = top.module()
    made.meta.update(gm.meta)
    return made.eval()


def activations(student: Student, call: Call) -> int:
    """Bytes that autograd keeps of one call until the backward pass, beside the model's own
    tensors. Takes a forward pass, and keeps none of them."""
    own = {
        tensor.untyped_storage()._cdata
        for tensor in (*student.module.parameters(), *student.module.buffers())
    }
    # the weak references see to it that no other storage gets the address of one that is gone
    seen: dict[int, StorageWeakRef] = {}
    sizes: list[int] = []

    def pack(saved: Tensor) -> None:
        storage = saved.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            sizes.append(storage.nbytes())

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _never):
        student(call)
    return sum(sizes)


def _never(_: object) -> Tensor:
    raise AssertionError("no backward pass follows")


def is_short(student: Student, call: Call) -> bool:
    """Whether the activations of a call take more than half of the memory that is free."""
    device = student.device
    there = free() if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
    needed = activations(student, call)
    short = needed > there // 2
    _LOG.info(
        "refine: activations of a batch take %s, and %s are free%s",
        shown(needed),
        shown(there),
        ": computed again in the backward pass" if short else "",
    )
    return short


def _whole(graph: fx.Graph, bounds: Sequence[int]) -> list[int]:
    """The bounds without those inside a region under other modes than the caller's, and those over
    which something is written into: computed again, it would be written into twice."""
    nodes, modes = list(graph.nodes), modes_of(graph)
    place = {node: at for at, node in enumerate(nodes)}
    over = {at for at in bounds[1:] if modes[nodes[at - 1]] is not None}
    for node in nodes:
        if not is_in_place(node):
            continue
        same = {one for read in node.all_input_nodes for one in sharing_memory(read)}
        if any(one.op == "get_attr" for one in same):
            raise RefineError(
                f"recompute: {node.name!r} may write into a tensor of the model, which computing "
                f"again would do twice; {_OTHERWISE}"
            )
        first = min(map(place.__getitem__, same))
        over.update(at for at in bounds[1:] if first < at <= place[node])
    return [at for at in bounds if at not in over]


__all__ = ["activations", "is_short", "recomputed"]
