"""A custom ``torch.autograd.Function`` stays one call, with its own backward.

Its ``forward`` runs without gradients, and what it does says nothing about its ``backward``
(straight-through estimators, reversed gradients), so a graph cannot hold it in pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

if TYPE_CHECKING:
    from fxshare.capture.tracing.tracer import ValueTracer

_PLAIN = (fx.Proxy, Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


class FunctionCall(nn.Module):
    """One call of a ``torch.autograd.Function``: a leaf of the graph.

    ``fixed`` are the arguments, by their place, that no graph can hold; the others are given.
    """

    def __init__(self, function: type[Any], fixed: Mapping[int, Any]) -> None:
        super().__init__()
        self.function = function
        self.fixed = dict(fixed)
        # passes ask for this name: what is written into is not computed once for all
        self.inplace = _marks_dirty(function)

    def forward(self, *given: Any) -> Any:
        """What the function returns for all of its arguments."""
        rest = iter(given)
        count = len(given) + len(self.fixed)
        args = [self.fixed[at] if at in self.fixed else next(rest) for at in range(count)]
        return self.function.apply(*args)

    def extra_repr(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def _marks_dirty(function: type[Any]) -> bool:
    parts = (getattr(function, name, None) for name in ("forward", "setup_context"))
    codes = (getattr(part, "__code__", None) for part in parts)
    return any(code is not None and "mark_dirty" in code.co_names for code in codes)


@contextlib.contextmanager
def kept_functions(tracer: ValueTracer) -> Iterator[None]:
    """Record calls of functions that are given proxies; restored afterwards. To be entered under
    the lock of a trace."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, fx.Proxy))
        traced = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        if cls is CheckpointFunction and (traced or not tracer.passes_by):
            run, _, *rest = args  # the same numbers and gradients; what differs is the memory
            return run(*rest)
        if traced and not tracer.passes_by:
            return _recorded(tracer, cls, args)
        return original.__get__(None, cls)(*args, **kwargs)

    function: Any = torch.autograd.Function
    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


@contextlib.contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints keep what they compute: their backward pass accumulates gradients by
    itself, and torch.autograd.grad refuses it. The numbers are the same. To be entered under the
    lock of a trace."""
    function: Any = CheckpointFunction
    original = function.__dict__.get("apply")

    def apply(cls: type[Any], run: Any, preserve: Any, *args: Any) -> Any:
        return run(*args)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        if original is None:
            del function.apply
        else:
            function.apply = original


def _recorded(tracer: ValueTracer, function: type[Any], args: tuple[Any, ...]) -> fx.Proxy:
    fixed = {at: arg for at, arg in enumerate(args) if not _is_plain(arg)}
    given = tuple(arg for at, arg in enumerate(args) if at not in fixed)
    number = 0
    while hasattr(tracer.root, f"autograd_function_{number}"):
        number += 1
    name = f"autograd_function_{number}"
    tracer.root.add_module(name, FunctionCall(function, fixed))
    return tracer.create_proxy("call_module", name, given, {})


def _is_plain(argument: Any) -> bool:
    leaves = pytree.tree_leaves(argument, is_leaf=lambda x: isinstance(x, fx.Proxy))
    return all(isinstance(leaf, _PLAIN) for leaf in leaves)


def function_calls(root: nn.Module) -> dict[str, FunctionCall]:
    """The calls that a trace put at the root, by name."""
    return {n: m for n, m in root.named_children() if isinstance(m, FunctionCall)}
