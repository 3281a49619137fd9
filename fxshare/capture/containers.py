"""Values of arguments taken apart: lists, dictionaries and tuples, and data classes too, which
torch's pytrees take for leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def is_record(value: object) -> bool:
    """Whether a value is a data class that pytrees take for a leaf."""
    # transformers' ModelOutput is a data class and a dictionary, and pytrees know it
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, (type, dict))
        and type(value) not in pytree.SUPPORTED_NODES
    )


def leaves(value: object) -> Iterator[Any]:
    """Every leaf of a value."""
    for leaf in pytree.tree_leaves(value):
        if is_record(leaf):
            for field in dataclasses.fields(leaf):
                yield from leaves(getattr(leaf, field.name, None))
        else:
            yield leaf


def mapped(kind: type[T], change: Callable[[T], Any], value: Any) -> Any:
    """The value with every leaf of that class changed; the value itself stays as it is."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            return change(leaf)
        return _mapped_record(kind, change, leaf) if is_record(leaf) else leaf

    return pytree.tree_map(of, value)


def _mapped_record(kind: type[T], change: Callable[[T], Any], record: Any) -> Any:
    changed = {
        field.name: mapped(kind, change, getattr(record, field.name))
        for field in dataclasses.fields(record)
        if hasattr(record, field.name)
    }
    result = copy.copy(record)
    for name, value in changed.items():
        object.__setattr__(result, name, value)  # frozen ones too: the copy is ours
    return result


def holds_tensor(value: object) -> bool:
    """Whether the value is, or contains, a tensor; only such values become graph inputs."""
    return any(isinstance(leaf, Tensor) for leaf in leaves(value))


__all__ = ["holds_tensor", "is_record", "leaves", "mapped"]
