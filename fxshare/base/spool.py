"""Batches that are given once and gone through again: in memory where they are few, or in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshare.base.unfinished import temporary_folder

_IN_MEMORY = 1 << 26
_PLAIN = (Tensor, int, float, str, bool, type(None))


class Spooled(Sequence[object]):
    """The items of an iterable, gone through once. The first 64 MB of tensors stay in memory, what
    comes after them is in files in the system's place for temporary ones (``TMPDIR``) for as long
    as this is alive; what is no tensors in plain containers stays in memory in any case."""

    def __init__(self, items: Iterable[object], *, in_memory: int = _IN_MEMORY) -> None:
        self._items: list[object] = []
        self._folder: Path | None = None
        held = 0
        for item in items:
            given = _plain(item)
            size = sum(t.numel() * t.element_size() for t in _tensors(given))
            if given is None or held + size <= in_memory:
                self._items.append(item)
                held += size
            else:
                self._items.append(self._written(given))

    def _written(self, item: Any) -> _Filed:
        if self._folder is None:
            self._folder = temporary_folder(self)
        path = self._folder / f"{len(self._items)}.pt"
        torch.save(item, path)
        return _Filed(path)

    @overload
    def __getitem__(self, at: int) -> object: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> object:
        if isinstance(at, slice):
            return Picked(self, range(len(self))[at])
        found = self._items[at]
        return torch.load(found.path, weights_only=True) if isinstance(found, _Filed) else found

    def __len__(self) -> int:
        return len(self._items)


class Picked(Sequence[object]):
    """Some of the items of a sequence, in an order, read when they are asked for."""

    def __init__(self, items: Sequence[object], which: Sequence[int]) -> None:
        self._items, self._which = items, which

    @overload
    def __getitem__(self, at: int) -> object: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> object:
        if isinstance(at, slice):
            return Picked(self._items, self._which[at])
        return self._items[self._which[at]]

    def __len__(self) -> int:
        return len(self._which)


class _Filed:
    """An item that is in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path


def _plain(item: object) -> Any:
    """The item of plain containers, as torch reads them back; None where it is none."""
    if isinstance(item, Mapping) and not isinstance(item, dict):
        item = dict(item)
    leaves, spec = pytree.tree_flatten(item)
    containers = {spec.type, *(part.type for part in _specs(spec))}
    if not containers <= {dict, list, tuple, None}:
        return None
    return item if all(isinstance(leaf, _PLAIN) for leaf in leaves) else None


def _specs(spec: Any) -> Iterable[Any]:
    for part in spec.children():
        yield part
        yield from _specs(part)


def _tensors(item: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor)]


__all__ = ["Picked", "Spooled"]
