"""What the nodes of a trace give on fake tensors: sizes, strides, dtypes and devices only."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxshare.capture.containers import mapped
from passes.graph.graph import is_linear, weight_and_bias
from passes.graph.writes import AUGMENTED

_PLAIN = (getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
_GROUPED = (torch._grouped_mm, nn.functional.grouped_mm)
_LITERALS = frozenset(
    {bool, int, float, str, type(None), type(Ellipsis)}
    | {torch.dtype, torch.device, torch.memory_format, torch.layout}
)


def fake_mode() -> FakeTensorMode:
    """A mode to trace in. What a mask takes out has a size without a number: whoever asks for it
    gets an error, and ``y[mask] *= 2`` does not ask."""
    sizes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes)


def fake_like(
    mode: FakeTensorMode, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A fake tensor of the shape of ``tensor``, a parameter where that is one. ``torch.empty`` and
    ``nn.Parameter`` under the mode do the same, each through all of its dispatch."""
    fake = FakeTensor(mode, torch.empty(tensor.shape, dtype=dtype, device="meta"), device)
    if isinstance(tensor, nn.Parameter):
        fake.requires_grad_(tensor.requires_grad)
        fake._is_param = True  # as nn.Parameter marks a tensor of another class
    return fake


class FakeValues:
    """The values of nodes, computed once for all nodes that do the same with the same shapes.

    A fake tensor is its metadata, so what layer 0 gave is what every layer gives: the next
    ``torch.mul`` of these shapes gets the very object of the first. torch has such a cache too, but
    finding a hit in it takes as long as half of a trace. Only torch's own functions, methods and
    leaf modules are looked up; operations in place never are, and work on a tensor of their own.

    ``inputs`` are the values of the placeholders by name.
    """

    def __init__(self, inputs: Mapping[str, Any], mode: FakeTensorMode | None = None) -> None:
        self._inputs = inputs
        self._mode = mode or fake_mode()  # one that the model's own fake tensors belong to
        self._faked: dict[int, tuple[Tensor, FakeTensor]] = {}
        self._made: dict[object, Any] = {}

    def fake(self, value: Any) -> Any:
        """The fake tensor of a tensor, the same one every time; anything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self._faked:
            fake = self._mode.from_tensor(value, static_shapes=True)
            self._faked[id(value)] = (value, fake)  # the real one too: its id must not be reused
        return self._faked[id(value)][1]

    def unshared(self, value: Any) -> Any:
        """A fake tensor like ``value`` that no other node has, to be changed in place."""
        if not isinstance(value, FakeTensor):
            return value
        with self._mode, torch.no_grad():
            twin = value.detach()
        assert isinstance(twin, FakeTensor)
        twin.constant = None  # its numbers are about to change
        return twin

    def of(self, root: nn.Module, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of a node of ``root`` whose arguments have the values ``args``, ``kwargs``."""
        if kind == "get_attr":
            return self.fake(operator.attrgetter(target)(root))
        if target is operator.setitem:  # sizes stay, and a mask says of no size what it takes
            return None
        if kind == "call_function" and target in _PLAIN and not isinstance(args[0], Tensor):
            return target(*args, **kwargs)  # numbers and sizes, which no mode has a say in
        module = root.get_submodule(target) if kind == "call_module" else None
        known = module is not None and not kwargs and not any(_autocast())
        width = _width(module, args) if known and module is not None else None
        key = _key(kind, target, args, kwargs, module, width)
        if key is not None and key in self._made:
            return self._made[key]
        if width is not None:  # known without the operations inside
            value = args[0].new_empty((*args[0].shape[:-1], width))
        else:
            with self._mode, torch.no_grad():
                value = self._computed(kind, target, args, kwargs, module)
        if key is not None and _is_metadata(value):
            self._made[key] = value
        return value

    def _computed(
        self, kind: str, target: Any, args: Any, kwargs: Any, module: nn.Module | None
    ) -> Any:
        if kind == "placeholder":
            return mapped(Tensor, self.fake, self._inputs[str(target)])
        if kind == "call_function" and target in _GROUPED:
            return _grouped(target, args, kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if module is not None:
            tensors = (*module.named_parameters(), *module.named_buffers())
            state = {name: self.fake(tensor) for name, tensor in tensors}
            return torch.func.functional_call(module, state, tuple(args), dict(kwargs))
        return None


def _grouped(target: Any, args: Any, kwargs: Any) -> Any:
    """A product of runs of rows, which torch evaluates without values in bfloat16 only."""
    if len(args) > 1 and (args[0].ndim, args[1].ndim) == (2, 3) and not kwargs.get("out_dtype"):
        return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
    return target(*args, **kwargs)


def changes_in_place(kind: str, target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a node is one of torch's operations in place, such as ``unsqueeze_``, or ``+=``, or
    writes into ``out``."""
    if "out" in kwargs or (kind == "call_function" and target in AUGMENTED):
        return True
    if kind == "call_method":
        name = str(target)
    elif kind == "call_function":
        name = getattr(target, "__name__", "")
    else:
        return False
    return name.endswith("_") and not name.endswith("__")


def _width(module: nn.Module, args: Any) -> int | None:
    """Output features of a linear that would take ``args``; where not, calling it tells why."""
    if not is_linear(module) or len(args) != 1:
        return None
    (x,) = args
    weight_OI, _ = weight_and_bias(module)
    wanted = (weight_OI.shape[1], weight_OI.dtype, weight_OI.device)
    fits = isinstance(x, Tensor) and x.ndim > 1 and (x.shape[-1], x.dtype, x.device) == wanted
    return weight_OI.shape[0] if fits else None


class _UnlikeAnyError(Exception):
    """A value that cannot be told equal to another by what it is."""


def _key(
    kind: str, target: Any, args: Any, kwargs: Any, module: nn.Module | None, width: int | None
) -> object:
    """What tells whether another node has the same value; None where nothing does."""
    try:
        if width is not None:
            return ("linear", width, _like(args))
        if module is not None:
            what = _like_module(module)
        elif _is_pure(kind, target, args, kwargs):
            what = target
        else:
            return None
        # a cast for the tensors made from numbers, and one for the operations under autocast
        around = (torch.get_default_dtype(), _autocast())
        return (kind, what, _like(args), _like(kwargs), around)
    except _UnlikeAnyError:
        return None


def _is_pure(kind: str, target: Any, args: Any, kwargs: Any) -> bool:
    if changes_in_place(kind, target, kwargs):
        return False
    if kind == "call_method":
        return bool(args) and isinstance(args[0], FakeTensor)
    if kind != "call_function":
        return False
    home = str(getattr(target, "__module__", "")).partition(".")[0]
    if home == "_operator":
        return not target.__name__.startswith("i") and target is not operator.setitem
    return home == "torch" or target is getattr


def _autocast() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )


def _like_module(module: nn.Module) -> object:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules.") or "forward" in vars(module):
        raise _UnlikeAnyError
    if module._forward_hooks or module._forward_pre_hooks or module._modules:
        raise _UnlikeAnyError
    tensors = (*module.named_parameters(), *module.named_buffers())
    state = tuple((n, t.shape, t.stride(), t.dtype, t.device) for n, t in tensors)
    return (kind, module.extra_repr(), module.training, state)


def _like(value: Any) -> object:
    """Equal for arguments with which an operation gives the same metadata."""
    kind = type(value)
    if kind in _LITERALS:
        return (kind, value)  # True is 1, and 1.0 as well
    if kind is FakeTensor:
        return _like_tensor(value)
    if isinstance(value, (tuple, list)):
        return (kind, *map(_like, value))
    if isinstance(value, dict):
        return tuple((name, _like(inner)) for name, inner in value.items())
    if kind is slice:
        return (kind, _like(value.start), _like(value.stop), _like(value.step))
    raise _UnlikeAnyError


def _like_tensor(value: FakeTensor) -> object:
    # a constant is known by its numbers, and a view of a complex tensor by more than its strides
    plain = value.constant is None and value.layout is torch.strided
    if not plain or value.is_complex() or value.is_neg():
        raise _UnlikeAnyError
    if not all(isinstance(size, int) for size in value.shape):
        raise _UnlikeAnyError
    place = (value.dtype, value.device, value.requires_grad, value.storage_offset())
    return (value.shape, value.stride(), *place)


def _is_metadata(value: Any) -> bool:
    """Whether a value may stand for many nodes: it is known by its type and sizes alone."""
    if isinstance(value, FakeTensor):
        return value.constant is None
    if isinstance(value, tuple):
        return all(_is_metadata(inner) for inner in value)
    return type(value) in (int, torch.device, torch.dtype)
