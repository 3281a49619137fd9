"""Constants that follow the model's dtype.

Tracing bakes ``x.to(hidden.dtype)`` as ``x.to(torch.float32)`` and ``torch.finfo(dtype).min`` as
-3.4e38. A second trace, of a copy without values in another dtype, differs in just those constants;
each becomes a :class:`DtypeSwitch` of the graph module, which ``.half()`` casts with everything
else. What is ``torch.float32`` in both traces is float32 by the model's own intent, and stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxshare.capture.call import Call
from fxshare.capture.containers import mapped
from fxshare.capture.guards import hold_dtype
from fxshare.capture.tracing.align import Difference, StructureDiffers, replace_constant
from fxshare.capture.tracing.values import fake_like
from fxshare.models.structure import without_values

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FIELDS = ("max", "min", "eps", "tiny")


class DtypeSwitch(nn.Module):
    """A dtype, or ``scale · torch.finfo(dtype).<field>``, of which ``.to()`` changes the dtype.

    The dtype is that of an empty buffer, which is not part of the state dict.
    """

    like: Tensor

    def __init__(self, like: Tensor, field: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.field = field
        self.scale = scale
        self.register_buffer("like", like, persistent=False)

    def forward(self) -> torch.dtype | float:
        """The dtype, or the number."""
        if self.field is None:
            return self.like.dtype
        limit: float = getattr(torch.finfo(self.like.dtype), self.field)
        return self.scale * limit

    def extra_repr(self) -> str:
        number = "" if self.field is None else f", {self.scale} · finfo.{self.field}"
        return f"{self.like.dtype}{number}"


def other_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype to compare with; None where nothing of the model is floating-point.

    Code that has a branch for one dtype has it for float16, so that is the one to try.
    """
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not found:
        return None
    return torch.float32 if found & {torch.float16, torch.bfloat16} else torch.float16


def cast_without_values(model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model whose floating-point tensors are fake and of ``dtype``; no memory."""

    def fake(name: str, tensor: Tensor) -> Tensor:
        return fake_like(mode, tensor, dtype, tensor.device)

    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return without_values(model, {n: t for n, t in named if t.is_floating_point()}, fake)


def cast_call(call: Call, dtype: torch.dtype) -> Call:
    """The call with every floating-point tensor in ``dtype``."""
    cast: Call = mapped(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, dict(call))
    return cast


def switches_for(found: Sequence[Difference], device: torch.device) -> list[DtypeSwitch]:
    """The switch for each difference between two traces in two dtypes.

    Raises :class:`StructureDiffers` for a constant that is neither a dtype nor from its limits.
    """
    return [_switch(difference, device) for difference in found]


def _switch(difference: Difference, device: torch.device) -> DtypeSwitch:
    left, right = difference.left, difference.right
    if isinstance(left, torch.dtype):
        if left in _FLOATS and right in _FLOATS:
            return DtypeSwitch(torch.empty(0, dtype=left, device=device))
    elif isinstance(left, float) and isinstance(right, float):
        for a in _FLOATS:
            for field in _FIELDS:
                for b in _FLOATS:
                    scale = left / getattr(torch.finfo(a), field)
                    if a is not b and scale and right == scale * getattr(torch.finfo(b), field):
                        like = torch.empty(0, dtype=a, device=device)
                        return DtypeSwitch(like, field, scale)
    raise StructureDiffers(str(difference))


def insert_switches(
    root: nn.Module, graph: fx.Graph, found: Sequence[Difference], made: Sequence[DtypeSwitch]
) -> None:
    """Replace each constant by the value of its switch; equal switches become one submodule."""
    nodes: dict[tuple[Any, ...], fx.Node] = {}
    for difference, switch in zip(found, made, strict=True):
        key = (switch.like.dtype, switch.field, switch.scale)
        if key not in nodes:
            nodes[key] = _call(root, graph, switch)
        replace_constant(difference, nodes[key])


def insert_hold(root: nn.Module, graph: fx.Graph, dtype: torch.dtype, why: str) -> None:
    """Let the graph refuse to run once it is cast from ``dtype`` to another."""
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    node = _call(root, graph, DtypeSwitch(torch.empty(0, dtype=dtype, device=device)))
    with graph.inserting_after(node):
        graph.call_function(hold_dtype, (node, dtype, why))


def _call(root: nn.Module, graph: fx.Graph, switch: DtypeSwitch) -> fx.Node:
    number = 0
    while hasattr(root, f"dtype_switch_{number}"):
        number += 1
    root.add_module(f"dtype_switch_{number}", switch)
    # torch.export puts the reads of parameters before the inputs
    nodes = list(graph.nodes)
    inputs = [at for at, node in enumerate(nodes) if node.op == "placeholder"]
    with graph.inserting_before(nodes[max(inputs, default=-1) + 1]):
        return graph.call_module(f"dtype_switch_{number}")
