"""Runs of rows or columns that a node takes of matrices: ``gate, up = w.chunk(2, -1)``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_CHUNK = (torch.chunk, _aten.chunk.default, "chunk")
_SPLIT = (
    torch.split,
    torch.functional.split,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    "split",
    "split_with_sizes",
)
Bounds = tuple[tuple[int, int], ...]


def cut_of(node: fx.Node, shape: Sequence[int]) -> tuple[int, Bounds, bool] | None:
    """Along which dimension, -1 or -2, a node cuts its first operand of this shape, and at which
    bounds; whether it gives all parts, or one. None where it does something else."""
    if node.op not in ("call_function", "call_method"):
        return None
    given = (*node.args[1:], *node.kwargs.values())
    if node.target in (*_CHUNK, *_SPLIT) and given:
        dim = _last(given[1] if len(given) > 1 else 0, len(shape))
        if dim is None:
            return None
        bounds = _bounds(given[0], shape[dim], chunks=node.target in _CHUNK)
        return None if bounds is None else (dim, bounds, True)
    if node.target is _aten.slice.Tensor and len(given) == 3:
        return _one(_last(given[0], len(shape)), slice(*given[1:]), shape)
    if node.target is operator.getitem:
        index: Any = node.args[1]
        index = index if isinstance(index, (tuple, list)) else (index,)
        if Ellipsis in index:
            at = list(index).index(Ellipsis)
            middle = [slice(None)] * (len(shape) - len(index) + 1)
            index = (*index[:at], *middle, *index[at + 1 :])
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        taken = [at for at, one in enumerate(index) if one != slice(None)]
        if len(taken) == 1 and isinstance(index[taken[0]], slice):
            return _one(_last(taken[0], len(shape)), index[taken[0]], shape)
    return None


def _last(dim: object, ndim: int) -> int | None:
    """A dimension counted from the end, where it is one of the last two."""
    if not isinstance(dim, int):
        return None
    found = dim % ndim - ndim
    return found if found >= -2 else None


def _bounds(sizes: object, whole: int, *, chunks: bool) -> Bounds | None:
    if isinstance(sizes, int) and sizes > 0:
        step = -(-whole // sizes) if chunks else sizes
        return tuple((at, min(at + step, whole)) for at in range(0, whole, step))
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, int) for size in sizes):
        return None
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def _one(dim: int | None, taken: slice, shape: Sequence[int]) -> tuple[int, Bounds, bool] | None:
    numbers = (taken.start, taken.stop, taken.step)
    if dim is None or not all(n is None or isinstance(n, int) for n in numbers):
        return None
    start, stop, step = taken.indices(shape[dim])
    return (dim, ((start, stop),), False) if step == 1 and start < stop else None
