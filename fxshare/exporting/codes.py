"""Quantised weights as modules of plain tensors, which ``torch.export`` carries.

A tensor that holds codes is one of Python's; a program has integer tensors, and the operations that
make values of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxshare.base.quantised import Quantised
from fxshare.capture.modules import BorrowedBasis
from fxshare.errors import ExportError
from passes.graph.graph import structure_copy


class Coded(nn.Module):
    """In the place of a module with a quantised weight: codes and scales, from which ``weight`` is
    made anew at each read; called, it is a linear."""

    codes: Tensor
    scale: Tensor

    def __init__(self, module: nn.Module, weight: Quantised, *, onnx: bool = False) -> None:
        super().__init__()
        self.onnx = onnx
        self.bits, self.group, self.width = weight.bits, weight.group, weight.shape[1]
        self.dtype = weight.dtype
        self.register_buffer("codes", weight.stored)
        self.register_buffer("scale", weight.scale)
        self.bias = module._parameters.get("bias")
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    @property
    def weight(self) -> Tensor:
        """The values ``(O, I)``."""
        codes, scale = self.codes, self.scale.to(self.dtype)
        if self.onnx:
            # written as an operator, since the exporter computes arithmetic on constants beforehand
            made: Tensor = torch.onnx.ops.symbolic(
                "DequantizeLinear",
                (codes, scale[:, 0]),
                {"axis": 0},
                dtype=self.dtype,
                shape=codes.shape,
                version=19,
            )
            return made
        if self.bits == 4:
            both = torch.cat([codes & 15, codes >> 4], 1)[:, : self.width]
            values = both.to(self.dtype) - 8
        else:
            values = codes.to(self.dtype)
        if scale.shape[1] == 1:
            return values * scale
        places = torch.arange(self.width, device=scale.device) // self.group
        return values * scale.index_select(1, places)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return F.linear(x, self.weight, self.bias)


def has_codes(model: nn.Module) -> bool:
    """Whether a model has quantised weights."""
    return any(isinstance(p, Quantised) for p in model.parameters())


def refuse_codes(model: nn.Module, to: str) -> None:
    """Raise :class:`ExportError` where a model has quantised weights, which a target cannot
    carry."""
    if has_codes(model):
        raise ExportError(
            f"the target {to} has no form for weights in few bits: export to pt2, aoti or onnx, "
            "which keep them, or to dense, which multiplies out; or compile without bits"
        )


def with_plain_tensors(model: nn.Module, *, onnx: bool = False) -> nn.Module:
    """The model, or where it has quantised weights a copy that has modules in their place, of
    operators of ONNX on demand.

    Raises :class:`ExportError` for weights of 4 bits then.
    """
    if not has_codes(model):
        return model
    result = structure_copy(model)
    made: dict[int, nn.Module] = {}
    for name, module in list(result.named_modules(remove_duplicate=False)):
        weight = module._parameters.get("weight")
        if isinstance(weight, Quantised):
            if onnx and weight.bits != 8:
                raise ExportError(
                    f"{name!r} has {weight.bits} bits, and the ONNX file would hold its values: "
                    "plan with 8 bits (planner: {bits: [16, 8]}), or export to pt2 or aoti, which "
                    "keep 4"
                )
            if id(module) not in made:
                made[id(module)] = Coded(module, weight, onnx=onnx).train(module.training)
            result.set_submodule(name, made[id(module)])
    for module in result.modules():
        if isinstance(module, BorrowedBasis):
            owner = module.__dict__["_owner"]
            module.__dict__["_owner"] = made.get(id(owner), owner)
    return result


__all__ = ["Coded", "has_codes", "refuse_codes", "with_plain_tensors"]
