"""An fx tracer whose proxies carry the value they would have on fake tensors.

Because every proxy knows its value, ``len``, iteration over shapes, ``if t > n``, ``assert`` and
the mask code of transformers just run; each branch that was taken is recorded as a guard.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fxshare.capture.containers import holds_tensor
from fxshare.capture.tracing.constants import outside, plain_number
from fxshare.capture.tracing.held import note_modes
from fxshare.capture.tracing.lines import model_line
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
from fxshare.capture.tracing.writing import PLAIN as AS_PLAIN
from fxshare.capture.tracing.writing import as_operator, written
from fxshare.errors import CaptureError
from passes.graph.graph import is_linear
from passes.graph.noted import noted
from passes.graph.writes import AUGMENTED

NumberT = TypeVar("NumberT", bool, int, float, str)
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


@dataclass(frozen=True)
class Guard:
    """A value that decided which path was traced: ``node`` gave ``value`` at ``where``."""

    node: fx.Node
    value: bool | int | float | str
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

    # whether x.device.type == "cuda" is asked at run time; a model on meta stands for a real one
    def __eq__(self, other: object) -> Any:
        if isinstance(self._known, str) and other == "meta":
            return False
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: object) -> Any:
        if isinstance(self._known, str) and other == "meta":
            return True
        return self.tracer.create_proxy("call_function", operator.ne, (self, other), {})

    # names = {"cpu": ...}; names[x.device.type] finds it, and asks whether it is equal
    def __hash__(self) -> int:
        return hash(self._known) if isinstance(self._known, str) else id(self)

    def __str__(self) -> str:
        if not isinstance(self._known, (str, torch.device)):
            return repr(self)
        proxy = self.tracer.create_proxy("call_function", str, (self,), {})
        assert isinstance(proxy, ValueProxy)
        return self.tracer.guard(proxy, str(self._known), "the text")

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

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self._known, Tensor):
            raise CaptureError(
                f"the model puts an item into a {type(self._known).__name__} ({self.node.name}) at "
                f"{model_line()}: only items of tensors can be written in a graph"
            )
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

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


def _augmented(in_place: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        if not isinstance(self._known, Tensor):
            return NotImplemented  # a size: Python adds instead
        return self.tracer.augment(self, other, in_place)

    return method


for _in_place in AUGMENTED:
    if _in_place is not operator.imatmul:  # tensors have none
        setattr(ValueProxy, f"__{_in_place.__name__}__", _augmented(_in_place))


class ValueTracer(fx.Tracer):
    """Traces a model on the values of one example call; see :class:`ValueProxy`."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        inputs: Mapping[str, Any],
        values: FakeValues,
        around: Around = PLAIN,
        *,
        nodes_of_constants: bool = False,
    ) -> None:
        """``values`` may be those of an earlier trace. ``nodes_of_constants``: what the model makes
        of numbers alone is a node too."""
        super().__init__(param_shapes_constant=False)
        self._around = around
        self.inputs = inputs
        self.nodes_of_constants = nodes_of_constants
        self.wrote_constant = False
        self.guards: dict[tuple[fx.Node, str], Guard] = {}
        self._values = values
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
        kind, target = as_operator(kind, target)
        self._check_written(written(kind, target, args, kwargs))
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
                proxy.node.meta |= noted(proxy._known.shape)
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

    def augment(self, changed: ValueProxy, other: Any, op: Callable[..., Any]) -> Any:
        """The node of ``changed += other``; it remembers whether ``changed + other`` is alike."""
        plain = AUGMENTED[op]
        proxy: Any = self.create_proxy(
            "call_function", op, (changed, other), {}, name=plain.__name__
        )
        was, self._computing = self._computing, True
        try:
            given = [x._known if isinstance(x, ValueProxy) else x for x in (changed, other)]
            new, found = self._values.of(self.root, "call_function", plain, given, {}), proxy._known
            alike = new.shape == found.shape and new.dtype == found.dtype
        except Exception:  # the operator in place knows better what is wrong
            alike = False
        finally:
            self._computing = was
        if alike:
            proxy.node.meta[AS_PLAIN] = plain
        return proxy

    def _check_written(self, target: Any) -> None:
        if not isinstance(target, Tensor) or isinstance(target, fx.Proxy):
            return
        kept = self.tensor_attrs.get(target, "_tensor_constant")  # by the model, or by this trace
        made = str(kept).startswith("_tensor_constant")
        self.wrote_constant = made and not self.nodes_of_constants
        raise CaptureError(
            f"the model writes into a tensor {tuple(target.shape)} at {model_line()} that is "
            "neither a buffer nor made by the call: a graph would keep what one call wrote for "
            "the next. Register it (register_buffer), or make it of the call's tensors"
        )

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
        if isinstance(a, Tensor) and a.requires_grad and self._name_of(a) is None:
            raise outside(a)
        a = plain_number(a)
        if isinstance(a, dict) and type(a) is not dict and hasattr(type(a), "to_tuple"):
            # transformers' ModelOutput, a dict and a dataclass at once
            fields = {name: self.create_arg(value) for name, value in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)

    # While a fake value is computed the hooks must be off, else each call of a module or read of a
    # parameter would be traced again, without end. fx's hooks are global: what another thread runs
    # meanwhile is none of our business.
    @property
    def passes_by(self) -> bool:
        """Whether what runs now is not to be traced."""
        return self._computing or threading.get_ident() != self._thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.passes_by:
            return forward(*args, **kwargs)
        if isinstance(m, nn.MultiheadAttention) and can_attend(m):
            forward = functools.partial(attend, m)
        if m not in (self.submodule_paths or ()):  # made in forward, or kept in a list or a closure
            return forward(*args, **kwargs)
        found = super().call_module(m, forward, args, kwargs)
        if type(found) is ValueProxy and found.node.op == "call_module":
            note_modes(found.node, m)
        return found

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.passes_by:
            return attr_val
        if not isinstance(attr_val, Tensor):
            return attr_val
        name = self._name_of(attr_val)
        if name is None:
            if isinstance(attr_val, nn.Parameter):
                raise outside(attr_val)
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer of the model."""
        # fx goes through all parameters of the model at every read of one
        if self._names is None:
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self._names = {id(tensor): (name, tensor) for name, tensor in reversed(named)}
        name, found = self._names.get(id(tensor), ("", None))
        return name if found is tensor else None
