"""The form of an argument: its containers, its non-tensors, and where its tensors are.

A form is made of tuples, strings and numbers, so that it can stand in the code of a graph and in a
hash over it: ``("list", ("tensor",), ("value", 3))``. Two calls take the same path through a model
only where the forms of their arguments are the same; the numbers in tensors are the graph's.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Mapping
from types import BuiltinFunctionType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

Form: TypeAlias = tuple[Any, ...]
TENSOR: Form = ("tensor",)
NONE: Form = ("value", None)
_LITERALS = (bool, int, float, complex, str, bytes, type(None))
_PLAIN: Mapping[type, str] = {list: "list", tuple: "tuple", torch.Size: "tuple"}
_LONGEST = 160


class Formless(Exception):
    """A value that cannot be told equal to another by what it is; internal to capture."""


def form_of(value: object) -> Form:
    """The form of a value.

    Raises :class:`Formless` naming the class of what has none.
    """
    if isinstance(value, (Tensor, fx.Proxy)):
        return TENSOR
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in _LITERALS:
        return ("value", value)
    if isinstance(value, enum.Enum):
        return ("enum", _name(kind), value.name)
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return ("torch", str(value))
    if kind in _PLAIN:
        assert isinstance(value, (list, tuple))
        return (_PLAIN[kind], *(form_of(item) for item in value))
    if kind in (slice, range):
        assert isinstance(value, (slice, range))
        return (kind.__name__, *(form_of(n) for n in (value.start, value.stop, value.step)))
    if kind in (set, frozenset):
        assert isinstance(value, (set, frozenset))
        return (kind.__name__, *sorted((form_of(item) for item in value), key=repr))
    return _form_of_object(value)


def _form_of_object(value: Any) -> Form:
    kind = type(value)
    if isinstance(value, Mapping):
        entries = tuple((_key(key), form_of(inner)) for key, inner in value.items())
        return ("dict" if kind is dict else _name(kind), *entries)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return (_name(kind), *((f, form_of(v)) for f, v in zip(kind._fields, value, strict=True)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return (_name(kind), *((name, form_of(getattr(value, name))) for name in names))
    home = _home(value)
    if home is not None:
        return ("named", home)
    raise Formless(f"a {kind.__module__}.{kind.__qualname__}")


def _home(value: Any) -> str | None:
    """The module in which a function or class is what its name says; two lambdas have one name,
    and which is meant cannot be told."""
    path = getattr(value, "__qualname__", None)
    if not isinstance(path, str):
        return None
    # torch's built-in functions do not say where they are
    name = path.rpartition(".")[2] if isinstance(value, BuiltinFunctionType) else path
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional"):
        found: Any = sys.modules.get(module or "")
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is value:
            return f"{module}:{name}"
    return None


def _key(key: object) -> Any:
    if isinstance(key, enum.Enum) or type(key) not in _LITERALS:
        raise Formless(f"a dictionary with a {type(key).__qualname__} among its keys")
    return key


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def same(form: Form, other: Form) -> bool:
    """Whether two forms are one. ``True`` is not 1, nor is 1.0; NaN is NaN."""
    if len(form) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(form, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return same(a, b)
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def matches(value: object, form: Form) -> bool:
    """Whether the value has the form."""
    try:
        return same(form_of(value), form)
    except Formless:
        return False


def shown(form: Form) -> str:
    """A form as one would write the value."""
    text = _text(form)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({_size(form)})"


def _size(form: Form) -> str:
    return f"{len(form) - 1} entries" if form[0] != "value" else f"{len(form[1]):,} characters"


def _text(form: Form) -> str:
    kind, *parts = form
    if kind == "tensor":
        return "a tensor"
    if kind == "value":
        return repr(parts[0])
    if kind == "enum":
        return f"{parts[0].rpartition(':')[2]}.{parts[1]}"
    if kind in ("torch", "named"):
        return str(parts[0].rpartition(":")[2] if kind == "named" else parts[0])
    if kind in ("list", "set"):
        return f"[{_joined(parts)}]" if kind == "list" else f"{{{_joined(parts)}}}"
    if kind == "tuple":
        return f"({_joined(parts)}{',' if len(parts) == 1 else ''})"
    if kind in ("slice", "range", "frozenset"):
        return f"{kind}({_joined(parts)})"
    if kind == "dict":
        return "{{{}}}".format(", ".join(f"{key!r}: {_text(inner)}" for key, inner in parts))
    fields = ", ".join(f"{name}={_text(inner)}" for name, inner in parts)
    return f"{kind.rpartition(':')[2]}({fields})"


def _joined(parts: list[Form]) -> str:
    return ", ".join(map(_text, parts))


def shown_value(value: object) -> str:
    """:func:`shown` of a value, or its class where it has no form."""
    try:
        return shown(form_of(value))
    except Formless as found:
        return str(found)


__all__ = [
    "NONE",
    "TENSOR",
    "Form",
    "Formless",
    "form_of",
    "matches",
    "same",
    "shown",
    "shown_value",
]
