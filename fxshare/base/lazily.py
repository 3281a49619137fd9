"""Mappings whose values take much memory together, and are made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Lazily(Mapping[str, Value], Generic[Value]):
    """A mapping whose values are computed, each time that they are asked for."""

    names: Sequence[str]
    make: Callable[[str], Value]

    def __getitem__(self, name: str) -> Value:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Once(Lazily[Value]):
    """A mapping whose values are computed when they are first asked for, and kept with it."""

    _made: dict[str, Value] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Value:
        if name not in self._made:
            self._made[name] = super().__getitem__(name)
        return self._made[name]


__all__ = ["Lazily", "Once"]
