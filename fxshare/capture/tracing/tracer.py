"""An fx tracer whose proxies carry the value they would have on fake tensors.

Because every proxy knows its value, ``len``, iteration over shapes, ``if t > n``, ``assert`` and
the mask code of transformers just run; each branch that was taken is recorded as a guard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxshare.capture.containers import holds_tensor
from fxshare.capture.tracing.multihead import attend, can_attend
from fxshare.capture.tracing.regions import (
    FLOATING,
    KEY,
    PLAIN,
    Around,
    may_have_gradients,
    seen,
)
from fxshare.capture.tracing.values import FakeValues, changes_in_place
from fxshare.errors import CaptureError
from passes.graph.graph import is_linear

NumberT = TypeVar("NumberT", bool, int, float)
# these take plain numbers and do not dispatch on a Proxy
_FACTORIES = ("arange", "ones", "zeros", "full", "empty", "tensor")
# of a cache: what it is, and not what is in it; but whether it has the keys of cross attention,
# which the models set as they go, decides about the path too
_LAYOUT = frozenset({"is_sliding", "is_linear", "is_dummy", "is_compileable", "is_updated"})
# fx would treat them as leaves because torch ships them, but they contain linears of their own
_CONTAINERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)
TRAINING = "training"
"""Where the ``meta`` of a leaf's call has the modes of the leaf and the modules in it."""
# tracing swaps torch's factories and fx swaps nn.Module.__call__: one trace at a time
TRACE_LOCK = threading.RLock()


@dataclass(frozen=True)
class Guard:
    """A value that decided which path was traced: ``node`` gave ``value`` at ``where``."""

    node: fx.Node
    value: bool | int | float
    where: str


class ValueProxy(fx.Proxy):
    """A proxy that knows its value on fake tensors (``_value``)."""

    tracer: ValueTracer

    def __init__(self, node: fx.Node, tracer: ValueTracer) -> None:
        super().__init__(node, tracer)
        self.__dict__["_value"] = None

    @property
    def _known(self) -> Any:
        return self.__dict__["_value"]

    # transformers asks isinstance(cache, Cache), and takes a mask that is ready if it is a Tensor;
    # a proxy passes for these beside being one
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        value = self.__dict__.get("_value")
        if isinstance(value, Tensor):
            is_mask = self.node.op == "placeholder" and "attention_mask" in str(self.node.target)
            return Tensor if is_mask and value.ndim == 4 else type(self)
        ours = type(value).__module__.partition(".")[0] in ("builtins", "torch", "fxshare")
        return type(self) if ours else type(value)

    def _node_of(self, name: str) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return proxy

    # a node, because the sizes of another call differ
    @property
    def shape(self) -> Any:
        return self.size()

    # a node, because a baked 'cpu' breaks gm.to('cuda')
    @property
    def device(self) -> Any:
        return self._node_of("device")

    @property
    def dtype(self) -> Any:
        return self._known.dtype

    @property
    def ndim(self) -> Any:
        return self._known.ndim

    @property
    def is_cuda(self) -> Any:
        return self._known.is_cuda

    @property
    def requires_grad(self) -> Any:
        return self._known.requires_grad

    def dim(self) -> Any:
        return self._known.ndim

    def is_floating_point(self) -> Any:
        return self._known.is_floating_point()

    def __len__(self) -> int:
        if isinstance(self._known, Tensor):
            return int(self.size(0))  # a node, and a guard on its value
        return len(self._known)

    def __bool__(self) -> bool:
        if isinstance(self._known, Tensor):
            raise CaptureError(
                f"the model branches on the data of a tensor ({self.node.name}) at "
                f"{model_line()}: a graph has one path"
            )
        return self.tracer.guard(self, bool(self._known), "the condition")

    def __iter__(self) -> Iterator[Any]:
        this: Any = self
        return iter([this[i] for i in range(len(self))])

    def __index__(self) -> int:
        return self.tracer.guard(self, int(self._known), "the number")

    def __int__(self) -> int:
        return self.tracer.guard(self, int(self._known), "the number")

    def __float__(self) -> float:
        return self.tracer.guard(self, float(self._known), "the number")

    def __contains__(self, key: object) -> bool:
        return key in self._known

    @property
    def keys(self) -> Any:
        found = self._known.keys  # of a mapping a method, of a cache's layer a tensor
        return self._node_of("keys") if isinstance(found, Tensor) else found

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__.get("_value")
        if value is not None and not name.startswith("__"):
            found = getattr(value, name)
            if isinstance(value, Tensor):
                if isinstance(found, Tensor):  # .T, .mT, .data
                    return self._node_of(name)
                if not callable(found):  # layout, is_nested, ...: the same for every call
                    return found
            elif name in _LAYOUT:
                return found
            elif dataclasses.is_dataclass(value) and not holds_tensor(found):
                return found  # the form of the argument is held
            elif not callable(found):  # an attribute of a Python object, such as a cache
                return self._node_of(name)
        return super().__getattr__(name)


class ValueTracer(fx.Tracer):
    """Traces a model on the values of one example call; see :class:`ValueProxy`."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        values: Mapping[str, Any],
        mode: FakeTensorMode | None = None,
        around: Around = PLAIN,
    ) -> None:
        super().__init__(param_shapes_constant=False)
        self._around = around
        self.guards: dict[tuple[fx.Node, str], Guard] = {}
        self._values = FakeValues(values, mode)
        self._computing = False
        self._names: dict[int, tuple[str, Tensor]] | None = None
        self._thread = threading.get_ident()

    def guard(self, proxy: ValueProxy, value: NumberT, what: str) -> NumberT:
        """Record that the traced path rests on ``value``."""
        where = f"{what} at {model_line()}"
        self.guards.setdefault((proxy.node, what), Guard(proxy.node, value, where))
        return value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_linear(m):
            return True
        return not isinstance(m, _CONTAINERS) and super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        if isinstance(proxy, ValueProxy):
            was, self._computing = self._computing, True
            try:
                with self._around.without():
                    proxy.__dict__["_value"] = self._value(kind, target, args, kwargs)
            finally:
                self._computing = was
            if isinstance(proxy._known, Tensor):
                # dim=2 may be the last one: passes cannot tell from an untyped graph
                proxy.node.meta["ndim"] = proxy._known.ndim
            proxy.node.meta[FLOATING] = may_have_gradients(proxy._known)
        return proxy

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind.startswith("call_"):
            node.meta[KEY] = seen()
        return node

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        changes = changes_in_place(kind, target, kwargs)

        def known(argument: Any) -> Any:
            if not isinstance(argument, ValueProxy):
                return self._values.fake(argument)
            if changes:
                argument.__dict__["_value"] = self._values.unshared(argument._known)
            return argument._known

        a: Any = map_aggregate(args, known)
        k: Any = map_aggregate(kwargs, known)
        return self._values.of(self.root, kind, target, a, k)

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if isinstance(a, dict) and type(a) is not dict and hasattr(type(a), "to_tuple"):
            # transformers' ModelOutput, a dict and a dataclass at once
            fields = {name: self.create_arg(value) for name, value in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)

    # While a fake value is computed the hooks must be off, else each call of a module or read of a
    # parameter would be traced again, without end. fx's hooks are global: what another thread runs
    # meanwhile is none of our business.
    @property
    def is_tracing(self) -> bool:
        """Whether what runs now is the model, in the thread of the trace."""
        return not self._passes_by

    @property
    def _passes_by(self) -> bool:
        return self._computing or threading.get_ident() != self._thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._passes_by:
            return forward(*args, **kwargs)
        if isinstance(m, nn.MultiheadAttention) and can_attend(m):
            forward = functools.partial(attend, m)
        found = super().call_module(m, forward, args, kwargs)
        made = type(found) is ValueProxy and found.node.op == "call_module"
        if made and TRAINING not in found.node.meta:  # a container hands on what its last leaf gave
            # what the model's own train() or forward() made of it, at the time of the call
            parts = m.named_modules(prefix=str(found.node.target))
            found.node.meta[TRAINING] = {name: part.training for name, part in parts}
        return found

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._passes_by:
            return attr_val
        if not isinstance(attr_val, Tensor):
            return attr_val
        # fx goes through all parameters of the model at every read of one
        if self._names is None:
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self._names = {id(tensor): (name, tensor) for name, tensor in reversed(named)}
        name, tensor = self._names.get(id(attr_val), ("", None))
        if tensor is not attr_val:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]


@contextlib.contextmanager
def traced_factories(tracer: ValueTracer) -> Iterator[None]:
    """Route ``torch.arange`` and its like through the tracer; always restored, under the lock."""
    with TRACE_LOCK:
        originals = {name: getattr(torch, name) for name in _FACTORIES}
        fast_path = torch.backends.mha.get_fastpath_enabled()
        # the fused encoder kernel would hide the linears inside it
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for name, original in originals.items():
                setattr(torch, name, _routed(tracer, original))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _routed(tracer: ValueTracer, original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, fx.Proxy))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return factory


_NOT_MODEL = ("torch", "fxshare.capture", "contextlib", "passes", "importlib", "transformers.utils")


def _is_model_code(module: str, filename: str) -> bool:
    outside = any(module == name or module.startswith(f"{name}.") for name in _NOT_MODEL)
    return not outside and not filename.startswith("<")


def model_line() -> str:
    """``module:line`` of the innermost frame that is the model's own code.

    The module and not the file, because the text stays in the graph and travels with it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if _is_model_code(module, frame.f_code.co_filename):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def failing_line(error: BaseException) -> str:
    """``file.py:line`` of the innermost frame of the model's own code in a traceback."""
    found = "an unknown line"
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_model_code(trace.tb_frame.f_globals.get("__name__", ""), code.co_filename):
            found = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
