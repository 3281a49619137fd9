"""Mappings whose values take much memory together, and are made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


__all__ = ["Lazily"]
