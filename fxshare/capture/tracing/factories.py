"""Functions of torch that do not dispatch on a proxy, swapped while a model is traced."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

# these take plain numbers and do not dispatch on a Proxy
_FACTORIES = ("arange", "ones", "zeros", "full", "empty", "tensor")
# what else makes a tensor of numbers or of another constant, for a model that writes into it
_MORE_FACTORIES = (
    "as_tensor",
    "empty_like",
    "eye",
    "full_like",
    "linspace",
    "ones_like",
    "scalar_tensor",
    "tril",
    "triu",
    "zeros_like",
)
# these want the text "cpu" and take no proxy for it
_ASKING = ((torch, "is_autocast_enabled"),)
_TAKING = (
    (torch, "get_autocast_dtype"),
    (torch.amp, "is_autocast_available"),
    (torch.amp.autocast_mode, "is_autocast_available"),
    (torch.autocast, "__init__"),
)
# tracing swaps torch's factories and fx swaps nn.Module.__call__: one trace at a time
TRACE_LOCK = threading.RLock()
# a process that is forked meanwhile has the lock and not the thread that would release it
os.register_at_fork(after_in_child=TRACE_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


class Tracing(Protocol):
    """What is needed of a tracer."""

    nodes_of_constants: bool

    @property
    def passes_by(self) -> bool:
        """Whether what runs now is not to be traced."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Proxy:
        """A node."""


@contextlib.contextmanager
def traced_factories(tracer: Tracing) -> Iterator[None]:
    """Route ``torch.arange`` and its like through the tracer; always restored, under the lock."""
    with TRACE_LOCK:
        names = (*_FACTORIES, *(_MORE_FACTORIES if tracer.nodes_of_constants else ()))
        originals = {name: getattr(torch, name) for name in names}
        asked = torch.backends.mha.get_fastpath_enabled
        # the fused encoder kernel would hide the linears inside it; what sets it is every thread's
        torch.backends.mha.get_fastpath_enabled = _not_in_this_thread(asked)
        try:
            for name, original in originals.items():
                setattr(torch, name, _routed(tracer, original))
            with _of_real_device(tracer):
                yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)
            torch.backends.mha.get_fastpath_enabled = asked


def _not_in_this_thread(asked: Callable[[], bool]) -> Callable[[], bool]:
    thread = threading.get_ident()

    def get_fastpath_enabled() -> bool:
        return threading.get_ident() != thread and asked()

    return get_fastpath_enabled


def _routed(tracer: Tracing, original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        if tracer.passes_by:
            return original(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, fx.Proxy))
        if tracer.nodes_of_constants or any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return factory


@contextlib.contextmanager
def _of_real_device(tracer: Tracing) -> Iterator[None]:
    """Let torch's functions take ``x.device.type`` of a traced tensor.

    Whether autocast is on is asked when the graph runs.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in (*_ASKING, *_TAKING)]
    try:
        for owner, name, original in originals:
            makes_node = (owner, name) in _ASKING
            setattr(owner, name, _unwrapping(tracer, original, makes_node=makes_node))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _unwrapping(
    tracer: Tracing, original: Callable[..., Any], *, makes_node: bool
) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        if makes_node and not tracer.passes_by and any(isinstance(x, fx.Proxy) for x in args):
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*map(_text, args), **{name: _text(x) for name, x in kwargs.items()})

    return function


def _text(value: Any) -> Any:
    if not isinstance(value, fx.Proxy):
        return value
    known = value.__dict__.get("_value")
    # a model on meta stands for one on a device
    return "cpu" if known == "meta" else known


__all__ = ["TRACE_LOCK", "traced_factories"]
