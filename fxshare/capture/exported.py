"""Capture by ``torch.export``: slower, at aten level, bound to one mode and device."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshare.capture.call import Shapes, holds_tensor
from fxshare.capture.tracing.dtypes import insert_hold
from fxshare.capture.tracing.trace import explicit_forward
from fxshare.capture.tracing.tracer import failing_line
from fxshare.errors import CaptureError
from passes.graph.graph import structure_copy


def export(model: nn.Module, shapes: Shapes) -> fx.GraphModule:
    """Export a copy of ``model`` with dynamic batch and sequence.

    Raises :class:`CaptureError` with the model's own line where it failed.
    """
    copy = structure_copy(model).eval()

    def dims(value: object) -> object:
        if not isinstance(value, Tensor):
            return None
        return dict.fromkeys(shapes.dynamic_dims(value), torch.export.Dim.AUTO)

    inputs = {name: value for name, value in shapes.base.items() if holds_tensor(value)}
    constants = {name: value for name, value in shapes.base.items() if name not in inputs}
    try:
        with explicit_forward(copy, list(inputs), constants), torch.random.fork_rng(devices=[]):
            program = torch.export.export(
                copy,
                (),
                inputs,
                dynamic_shapes=pytree.tree_map(dims, inputs),
                strict=False,
            )
        gm = program.module()
    except Exception as error:
        raise CaptureError(
            f"torch.export of {type(model).__name__} failed at {failing_line(error)}: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(gm, fx.GraphModule)
    for module in gm.modules():
        module.training = False  # what it computes, whatever torch.export leaves there
    _hold_dtype(gm)
    return gm


def _hold_dtype(gm: fx.GraphModule) -> None:
    """Which of the graph's dtypes are the model's own cannot be told: hold them where there are
    any, else a cast would end in torch's assertions or in float32 results."""
    dtype = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    for node in gm.graph.nodes:
        if dtype is not None and dtype in pytree.tree_leaves((node.args, dict(node.kwargs))):
            insert_hold(gm, gm.graph, dtype, "torch.export writes dtypes into the graph")
            gm.recompile()
            return
