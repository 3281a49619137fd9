"""Functions that a module keeps, such as a ``forward`` of its own, in a copy of that module.

``copy.deepcopy`` takes a function for a constant. What a function reaches through its closure or
its defaults then belongs to the module that was copied: its weights, its mode, its buffers.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

# torch copies what is in these
_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, tuple, set, frozenset)
_PLAIN = frozenset({bool, int, float, str, type(None)})


def rebind(module: nn.Module, copies: Mapping[int, nn.Module]) -> None:
    """Let what the modules of ``module`` keep in attributes and hooks reach the copies.

    ``copies`` has the copy of each original by the original's ``id``. Only functions, bound
    methods and containers that hold an original are replaced; anything else stays the object that
    it is, such as the list that a hook appends to. A function's globals count as what it holds.
    """
    search = _Search(copies)
    for part in module.modules() if copies else ():
        for name, value in list(part.__dict__.items()):
            kind = type(value)
            if kind in _PLAIN or (kind in _MAPPINGS and not value):
                continue  # most that modules keep
            if name not in _OWN:
                new = search.rebound(value)
                if new is not value:
                    part.__dict__[name] = new


class _Search:
    """Replaces originals by their copies in whatever holds them."""

    def __init__(self, copies: Mapping[int, nn.Module]) -> None:
        self._copies = copies
        # with the value itself, so that no other gets its id
        self._made: dict[int, tuple[Any, Any]] = {}

    def rebound(self, value: Any) -> Any:
        """``value`` with every original in it replaced; ``value`` itself where it holds none."""
        kind = type(value)
        if kind in _PLAIN or (kind in _MAPPINGS and not value):
            return value
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        if kind is types.MethodType:
            owner = self.rebound(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind not in (types.FunctionType, *_MAPPINGS, *_SEQUENCES):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = (value, value)  # one that holds itself
            rebound = self._function if kind is types.FunctionType else self._container
            self._made[id(value)] = (value, rebound(value))
        return self._made[id(value)][1]

    def _container(self, value: Any) -> Any:
        is_mapping = type(value) in _MAPPINGS
        inner = list(value.values()) if is_mapping else list(value)
        new = [self.rebound(item) for item in inner]
        if all(a is b for a, b in zip(inner, new, strict=True)):
            return value
        if not is_mapping:
            return type(value)(new)
        twin = copy.copy(value)  # not in place: what a closure holds is the original's
        twin.update(zip(value, new, strict=True))
        return twin

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        cells = value.__closure__ or ()
        held = tuple(map(_content, cells))
        parts = (held, value.__defaults__ or (), value.__kwdefaults__ or {}, value.__dict__)
        new = [self.rebound(part) for part in parts]
        names = self._globals(value)
        if not names and all(a is b for a, b in zip(parts, new, strict=True)):
            return value
        closure = tuple(
            cell if a is b else types.CellType(b)
            for cell, a, b in zip(cells, held, new[0], strict=True)
        )
        scope = {**value.__globals__, **names} if names else value.__globals__
        twin = types.FunctionType(
            value.__code__, scope, value.__name__, new[1] or None, closure or None
        )
        twin.__kwdefaults__ = new[2] or None
        twin.__dict__.update(new[3])
        twin.__qualname__, twin.__module__ = value.__qualname__, value.__module__
        twin.__doc__, twin.__annotations__ = value.__doc__, value.__annotations__
        return twin

    def _globals(self, value: types.FunctionType) -> dict[str, Any]:
        """The globals that hold an original, replaced. Functions of other files hold none."""
        found = {}
        for name in _names(value.__code__):
            held = value.__globals__.get(name)
            if isinstance(held, types.FunctionType) and held.__globals__ is not value.__globals__:
                continue
            new = self.rebound(held)
            if new is not held:
                found[name] = new
        return found


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
