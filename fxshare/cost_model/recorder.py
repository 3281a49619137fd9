"""The operations of a model's forward pass, recorded on fake tensors: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshare.base.fakes import failures_unsaid
from fxshare.cost_model.work import Attention, Matmul, Operation, Traffic

_QUIET = ("empty", "arange", "scalar_tensor", "lift_fresh", "detach")


def record_step(model: nn.Module, call: Mapping[str, Any]) -> list[Operation]:
    """The operations of ``model(**call)`` as they are dispatched in eager mode.

    Works on fake tensors of the same shapes and device. Whatever the model's code raises there
    (values that depend on data) is raised.
    """
    # a fake tensor takes no memory, and one made from a parameter leaves the parameter alone
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    fake_call = pytree.tree_map_only(Tensor, fakes.from_tensor, dict(call))
    recorder = _Recorder()
    with torch.no_grad(), failures_unsaid(), fakes, recorder:
        model(**fake_call)
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        one = _operation(func, args, kwargs or {}, out)
        if one is not None:
            self.found.append(one)
        return out


def _operation(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Operation | None:
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
    known = _KNOWN.get(name)
    if known is not None:
        return known(args, kwargs)
    returns = func._schema.returns
    view = (
        bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    )
    writes = _numbers(out)
    # without a tensor as result it asked for a shape or a device
    if view or not writes or name.startswith(_QUIET) or name == "_unsafe_view":
        return None
    # a table lookup reads as much as it writes, not the table
    reads = writes if name in ("embedding", "index", "index_select", "gather") else _numbers(args)
    return Traffic(reads, writes)


def _numbers(values: Any) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(values) if isinstance(t, Tensor))


def _mm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Matmul:
    a, b = args[-2:]
    return Matmul(a.shape[0], a.shape[1], b.shape[1])


def _bmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Matmul:
    a, b = args[-2:]
    return Matmul(a.shape[1], a.shape[2], b.shape[2], batch=a.shape[0])


def _mv(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Matmul:
    a, _ = args[-2:]
    return Matmul(1, a.shape[1], a.shape[0])


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Matmul:
    x, weight = args[:2]
    return Matmul(x.numel() // x.shape[-1], weight.shape[1], weight.shape[0])


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention:
    q, k = args[:2]
    causal = kwargs.get("is_causal", any(a is True for a in args[3:]))
    batch = math.prod(q.shape[:-2])
    return Attention(batch, q.shape[-2], k.shape[-2], q.shape[-1], causal=bool(causal))


_KNOWN: Mapping[str, Callable[[tuple[Any, ...], dict[str, Any]], Operation]] = {
    "mm": _mm,
    "addmm": _mm,
    "bmm": _bmm,
    "baddbmm": _bmm,
    "mv": _mv,
    "addmv": _mv,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}


__all__ = ["record_step"]
