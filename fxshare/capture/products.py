"""Half precision where there are no instructions for it: its products computed in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshare.base.placement import device_of, multiplies

_HALF = (torch.float16, torch.bfloat16)
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
_CONVOLUTIONS = frozenset({"convolution", "convolution_backward"})
_FEW = 16
"""Rows below which making a float32 matrix takes longer than the product."""


class WideProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of half precision are computed in float32 and rounded, as instructions for them do
    it; everything else is as it is, and so is what they return. A CPU that has none takes many
    times as long by itself."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if not _is_long(func, args):
            return func(*args, **given)
        tensors = [t for t in pytree.tree_leaves((args, given)) if isinstance(t, Tensor)]
        dtypes = {t.dtype for t in tensors}
        # one of a kind of its own (codes, say) does its products by itself
        plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        if len(dtypes) != 1 or not dtypes <= set(_HALF) or not plain:
            return func(*args, **given)
        dtype = dtypes.pop()
        wide = pytree.tree_map_only(Tensor, Tensor.float, (args, given))
        return pytree.tree_map_only(Tensor, lambda t: t.to(dtype), func(*wide[0], **wide[1]))


def _is_long(func: Any, args: tuple[Any, ...]) -> bool:
    packet = getattr(func, "overloadpacket", None)  # a higher-order operator has none
    if packet is None or func._overloadname == "out" or len(args) < 2:
        return False
    if packet.__name__ in _PRODUCTS:
        left, right = args[-2:]
        return bool(min(left.shape[-2], right.shape[-1]) >= _FEW)
    return packet.__name__ in _CONVOLUTIONS


def wide_products(module: nn.Module) -> AbstractContextManager[object]:
    """:class:`WideProducts` around what runs a module in half precision on a CPU without
    instructions for it; nothing around others."""
    device = device_of(module)
    if all(multiplies(device, dtype) for dtype in {p.dtype for p in module.parameters()}):
        return nullcontext()
    return WideProducts()  # type: ignore[no-untyped-call]


__all__ = ["WideProducts", "wide_products"]
