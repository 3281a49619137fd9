"""Quantised weights as modules of plain tensors, which ``torch.export`` carries.

A tensor that holds codes is one of Python's; a program has integer tensors, and the operations that
make values of them. For ONNX those are operators, since the exporter computes arithmetic on
constants beforehand: of 8 bits ``DequantizeLinear``, of 4 bits ``MatMulNBits`` of onnxruntime. Rows
that are looked up are codes, and made values of after: an embedding and the head that is tied to it
read one table.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxshare.base.quantised import GROUP, Quantised
from fxshare.capture.modules import BorrowedBasis
from fxshare.errors import ExportError
from passes.graph.graph import erase_dead, structure_copy
from passes.graph.lookups import Lookup, lookups


class Coded(nn.Module):
    """In the place of a module with a quantised weight: codes and scales, from which ``weight`` is
    made anew at each read; called, it is a linear, or looks rows up."""

    codes: Tensor
    scale: Tensor

    def __init__(self, module: nn.Module, weight: Quantised, *, onnx: bool = False) -> None:
        super().__init__()
        self.onnx = onnx
        self.bits, self.group, self.width = weight.bits, weight.group, weight.shape[1]
        self.dtype = weight.dtype
        packs = onnx and weight.bits == 4
        self.register_buffer("codes", _in_blocks(weight) if packs else weight.stored)
        scale = weight.scale.to(weight.dtype) if onnx else weight.scale
        # the operator for 8 bits takes one number a row
        self.register_buffer("scale", scale[:, 0] if onnx and weight.bits == 8 else scale)
        self.bias = module._parameters.get("bias")
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    @property
    def weight(self) -> Tensor:
        """The values ``(O, I)``."""
        return self._dequantised() if self.onnx else self._values(self.codes, self.scale)

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What rows of codes stand for, with their scales."""
        scale = scale.to(self.dtype)
        if self.bits == 8:
            return codes.to(self.dtype) * scale.reshape(-1, 1)
        if self.onnx:  # what torch.onnx writes for a shift of bytes, onnxruntime refuses
            codes = codes.int()
        halves = codes & 15, codes >> 4
        both = torch.stack(halves, -1).flatten(1) if self.onnx else torch.cat(halves, 1)
        values = both[:, : self.width].to(self.dtype) - 8
        if scale.shape[1] == 1:
            return values * scale
        places = torch.arange(self.width, device=scale.device) // self.group
        return values * scale.index_select(1, places)

    def forward(self, x: Tensor, *, look_up: bool = False) -> Tensor:
        """``x Wᵀ + b``, or with ``look_up`` the rows ``(..., I)`` of the numbers ``x``."""
        if look_up:
            at = x.reshape(-1)
            found = self._values(self.codes.index_select(0, at), self.scale.index_select(0, at))
            return found.reshape(*x.shape, self.width)
        if not self.onnx or self.bits == 8:
            return F.linear(x, self.weight, self.bias)
        rows = len(self.codes)
        # without an accuracy level of 1 inputs may be rounded to 8 bits
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scale),
            {
                "K": self.width,
                "N": rows,
                "bits": self.bits,
                "block_size": self.group,
                "accuracy_level": 1,
            },
            dtype=self.dtype,
            shape=(*x.shape[:-1], rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias

    def _dequantised(self) -> Tensor:
        """The values, by an operator of ONNX."""
        if self.bits != 8:
            raise ExportError(
                f"a weight {len(self.scale)}×{self.width} of {self.bits} bits is read otherwise "
                "than by a linear, and onnxruntime has no operator for that: plan with 8 bits "
                "(--bits 16,8), or export to pt2 or aoti, which keep 4"
            )
        made: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.codes, self.scale),
            {"axis": 0},
            dtype=self.dtype,
            shape=self.codes.shape,
            version=19,
        )
        return made


def _in_blocks(weight: Quantised) -> Tensor:
    """Codes of 4 bits ``(O, G, 16)`` as ``MatMulNBits`` reads them: two of neighbouring columns a
    byte, the first in the lower half, 8 for zero; blocks are filled up."""
    codes_OI = (weight.codes + 8).to(torch.uint8)
    whole = F.pad(codes_OI, (0, -codes_OI.shape[1] % GROUP), value=8)
    blocks = whole.reshape(len(whole), -1, GROUP)
    return blocks[..., 0::2] | (blocks[..., 1::2] << 4)


def has_codes(model: nn.Module) -> bool:
    """Whether a model has quantised weights."""
    return any(isinstance(p, Quantised) for p in model.parameters())


def refuse_codes(model: nn.Module, to: str) -> None:
    """Raise :class:`ExportError` where a model has quantised weights, which a target cannot
    carry."""
    if has_codes(model):
        raise ExportError(
            f"the target {to} has no form for weights in few bits: export to pt2, aoti or onnx, "
            "which keep them, or to dense; or compile without bits"
        )


def with_plain_tensors(model: nn.Module, *, onnx: bool = False) -> nn.Module:
    """The model, or where it has quantised weights a copy that has modules in their place, of
    operators of ONNX on demand.

    Such a module raises :class:`ExportError` where a weight of 4 bits is read then.
    """
    if not has_codes(model):
        return model
    result = structure_copy(model)
    for module in result.modules():
        if isinstance(module, fx.GraphModule):
            _look_up_codes(module)
    made: dict[int, nn.Module] = {}
    for name, module in list(result.named_modules(remove_duplicate=False)):
        weight = module._parameters.get("weight")
        if isinstance(weight, Quantised):
            if id(module) not in made:
                made[id(module)] = Coded(module, weight, onnx=onnx).train(module.training)
            result.set_submodule(name, made[id(module)])
    for module in result.modules():
        if isinstance(module, BorrowedBasis):
            owner = module.__dict__["_owner"]
            module.__dict__["_owner"] = made.get(id(owner), owner)
    return result


def _look_up_codes(gm: fx.GraphModule) -> None:
    """Let lookups of codes call the modules that will be there, which gather before they make
    values."""
    found = [one for one in lookups(gm) if isinstance(one.weight_VI, Quantised)]
    for one in found:
        weight = one.node.args[1]
        assert isinstance(weight, fx.Node)
        owner = _owner(gm, one)
        with gm.graph.inserting_before(one.node):
            rows = gm.graph.call_module(owner, (one.ids,), {"look_up": True})
        rows.meta.update(one.node.meta)
        one.node.replace_all_uses_with(rows)
        erase_dead(gm.graph, [weight, one.node])
        read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
        if weight.target in gm._parameters and weight.target not in read:
            delattr(gm, str(weight.target))
    if found:
        gm.recompile()


def _owner(gm: fx.GraphModule, lookup: Lookup) -> str:
    """The name of a module that holds what is looked up; of a parameter of the graph itself that
    of a head which is tied to it, or of a new one."""
    for name, module in gm.named_modules():
        if module is not gm and module._parameters.get("weight") is lookup.weight_VI:
            return str(name)
    name = f"{lookup.name.replace('.', '_')}_rows"
    while hasattr(gm, name):
        name += "_"
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(lookup.weight_VI, requires_grad=False))
    gm.add_module(name, holder)
    return name


__all__ = ["Coded", "has_codes", "refuse_codes", "with_plain_tensors"]
