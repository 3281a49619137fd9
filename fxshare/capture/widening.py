"""Half-precision modules run in float32, without float32 copies of all their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxshare.base.placement import device_of, multiplies
from fxshare.capture.captured import Captured
from fxshare.capture.guards import hold_dtype
from passes.graph.graph import bits_of, structure_copy

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class Widened(Tensor):
    """A half-precision tensor that reads as float32.

    Each operation gets float32 values made for it and dropped after it, so a model runs on the
    memory of its weights and one of them in float32. The numbers are those of ``.float()``.
    """

    _stored: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Tensor) -> Widened:
        made: Widened = Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=torch.float32,
            device=stored.device,
        )
        made._stored = stored
        made._is_param = True  # what makes it an nn.Parameter
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _aten.detach.default:
            return args[0]
        if func in (_aten.t.default, _aten.transpose.int):
            # what a linear keeps for its backward pass: no float32 copy of every weight
            return cls(func(args[0]._stored, *args[1:]))
        if func is _aten.embedding.default and isinstance(args[0], cls):
            # rows first: the float32 of a whole vocabulary may be the largest tensor of all
            return func(args[0]._stored, *args[1:], **(kwargs or {})).float()

        def wide(value: Tensor) -> Tensor:
            return value._stored.float() if isinstance(value, cls) else value

        given = pytree.tree_map_only(Tensor, wide, (args, kwargs or {}))
        return func(*given[0], **given[1])


def stored_of(tensor: Tensor) -> Tensor:
    """What is in memory of a tensor that may be a :class:`Widened` one."""
    return tensor._stored if isinstance(tensor, Widened) else tensor


def in_place_of(old: Tensor, values: Tensor, *, as_kept: bool) -> nn.Parameter:
    """A parameter of other values in the dtype of the ``old`` one, or ``as_kept`` in what that is
    kept in."""
    if as_kept and isinstance(old, Widened):
        made = Widened(values.to(old._stored.dtype).contiguous())
        assert isinstance(made, nn.Parameter)
        return made
    return nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=False)


def free(parameter: nn.Parameter) -> None:
    """Give back what is in memory of a parameter that is not used any more."""
    if isinstance(parameter, Widened):
        parameter._stored = parameter._stored.new_empty(0)
    else:
        parameter.data = parameter.data.new_empty(0)


def widen(module: nn.Module) -> None:
    """Let every floating-point parameter and buffer of a structure copy read as float32.

    Half-precision parameters are not copied; in place of each stands a :class:`Widened`. Ties
    stay ties.
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _wide(tensor, is_parameter=tensors is part._parameters)
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def widened(module: nn.Module) -> nn.Module:
    """A structure copy that computes in float32, its graphs included."""
    copy = structure_copy(module)
    for part in copy.modules():
        if isinstance(part, fx.GraphModule):
            cast_to_float32(part)
    widen(copy)
    return copy


def to_measure(captured: Captured) -> Captured:
    """The capture as statistics and losses are taken of it: of a model in half precision one that
    computes in float32, on a CPU that has no instructions for it (of float16 none is taken to
    have some). Where the model's own code runs, as it is."""
    module = captured.module
    device = device_of(module)
    able = all(multiplies(device, dtype) for dtype in {p.dtype for p in module.parameters()})
    if captured.side_by_side or able:
        return captured
    made = widened(module)
    for new, old in zip(made.parameters(), module.parameters(), strict=True):
        if not isinstance(new, Widened):
            new.requires_grad_(old.requires_grad)
    return replace(captured.computing(made), wide=True)


def cast_to_float32(gm: fx.GraphModule) -> None:
    """Dtypes that are constants of the graph, as torch.export makes them, become float32."""

    def wider(leaf: Any) -> Any:
        return torch.float32 if leaf in _HALF else leaf

    for node in list(gm.graph.nodes):
        if node.target is hold_dtype:
            gm.graph.erase_node(node)
            continue
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), wider)
    gm.recompile()


def _wide(tensor: Tensor, *, is_parameter: bool) -> Tensor:
    stored = tensor.detach()
    # codes read as float32 by themselves
    coded = bits_of(stored) is not None
    if is_parameter and tensor.dtype in _HALF and tensor.ndim > 1 and not coded:
        return Widened(stored)
    wide = stored.float()
    return nn.Parameter(wide, requires_grad=False) if is_parameter else wide


__all__ = [
    "Widened",
    "cast_to_float32",
    "free",
    "in_place_of",
    "stored_of",
    "to_measure",
    "widen",
    "widened",
]
