"""Where the rows of linears are in a tensor that was only moved about: views, transposes, pieces.

A :class:`Layout` has the trailing dimensions of a tensor. Some are *labelled*: along them the rows
of one or several weights lie, in the order of ``rows``. The others are *free*: batch, positions,
whatever else. That is enough to say, without knowing one size of the free ones, which row of which
weight is where after any ``view``, ``transpose``, ``split`` or ``expand``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

Rows = Tensor


class Unknown(Exception):
    """Why it cannot be told where rows are."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Trailing dimensions: a labelled one has its size, a free one None, and one of a free size
    times a labelled one (batch and heads as one) the latter's size, negative.

    ``rows`` has the labelled dimensions, in order. ``open`` says that further free ones may stand
    before.
    """

    dims: tuple[int | None, ...]
    rows: Rows
    open: bool = True

    @property
    def is_flat(self) -> bool:
        """Whether the last dimension alone is labelled."""
        return self.dims[-1] is not None and all(d is None for d in self.dims[:-1])

    @property
    def last(self) -> int:
        """The size of the last dimension, which must be labelled."""
        size = self.dims[-1]
        if size is None or size < 0:
            raise Unknown("has no rows along its last dimension")
        return size

    def axis(self, dim: int) -> int:
        """A dimension from the front, of one from either end."""
        if dim < 0 and -dim <= len(self.dims):
            return len(self.dims) + dim
        if self.open or not 0 <= dim < len(self.dims):
            raise Unknown(f"names dimension {dim} of a tensor whose dimensions cannot be counted")
        return dim

    def labelled(self, axis: int) -> int:
        """The place of a dimension among the labelled ones."""
        if self.dims[axis] is None:
            raise Unknown("takes a part of batch or positions")
        return sum(d is not None for d in self.dims[:axis])

    def moved(self, order: Sequence[int]) -> Layout:
        """The dimensions in another order, all of them named from the front."""
        axes = [self.labelled(at) for at in order if self.dims[at] is not None]
        return replace(
            self, dims=tuple(self.dims[at] for at in order), rows=self.rows.permute(axes)
        )

    def swapped(self, first: int, second: int) -> Layout:
        """Two dimensions in each other's place."""
        order = list(range(len(self.dims)))
        a, b = self.axis(first), self.axis(second)
        order[a], order[b] = order[b], order[a]
        return self.moved(order)

    def taken(self, dim: int, index: slice | int) -> Layout:
        """A part of a labelled dimension; of a number the dimension goes."""
        axis = self.axis(dim)
        at = self.labelled(axis)
        if (self.dims[axis] or 0) < 0:
            raise Unknown("takes a part of batch and heads together")
        rows = self.rows[(slice(None),) * at + (index,)]
        dims = list(self.dims)
        if isinstance(index, int):
            del dims[axis]
        else:
            dims[axis] = rows.shape[at]
        return replace(self, dims=tuple(dims), rows=rows)

    def inserted(self, dim: int) -> Layout:
        """A new free dimension, as ``unsqueeze`` makes it."""
        at = dim if dim >= 0 else len(self.dims) + 1 + dim
        if (dim >= 0 and self.open) or not 0 <= at <= len(self.dims):
            raise Unknown("puts in a dimension whose place cannot be told")
        return replace(self, dims=(*self.dims[:at], None, *self.dims[at:]))

    def repeated(self, dim: int, times: int) -> Layout:
        """A free dimension of size 1 as often as that, or a labelled one with each of its rows as
        often, as ``repeat_interleave`` does."""
        axis = self.axis(dim)
        if self.dims[axis] is not None:
            at = self.labelled(axis)
            rows = self.rows.repeat_interleave(times, at)
            dims = (*self.dims[:axis], rows.shape[at], *self.dims[axis + 1 :])
            return replace(self, dims=dims, rows=rows)
        at = sum(d is not None for d in self.dims[:axis])
        rows = self.rows.unsqueeze(at).repeat_interleave(times, at)
        return replace(self, dims=(*self.dims[:axis], times, *self.dims[axis + 1 :]), rows=rows)

    def reshaped(self, sizes: Sequence[int | None]) -> Layout:
        """Another shape of the same numbers; None and -1 are sizes that are not known.

        Matched from the end: a free dimension becomes a free one, and labelled neighbours are
        divided or put together among themselves. The free ones in front may be put together.
        """
        walk = _Reshape(list(self.dims), list(sizes), self.open)
        dims = walk.run()
        shape = [abs(d) for d in dims if d is not None]
        return Layout(tuple(dims), self.rows.reshape(shape), walk.open)


@dataclass(eq=False)
class _Reshape:
    """One walk through the dimensions before and after, from the end."""

    old: list[int | None]
    new: list[int | None]
    open: bool
    found: list[int | None] | None = None

    def run(self) -> list[int | None]:
        found: list[int | None] = []
        while self.new:
            if not self.old:
                # all that is in front, or batch and positions that were one dimension
                if not self.open and (not found or found[0] is not None):
                    raise Unknown("has more dimensions than can be told apart")
                found[:0] = [None] * len(self.new)
                self.open = False
                return found
            if self.old[-1] is None:
                self.old.pop()
                self.new.pop()
                found.insert(0, None)
            else:
                found[:0] = self._run_of_labels()
        if any(d is not None for d in self.old):
            # labels that batch is put together with
            raise Unknown("puts rows and batch together")
        if self.old and found and found[0] is not None:
            found[0] = -abs(found[0])
        self.open = False
        return found

    def _run_of_labels(self) -> list[int | None]:
        """The new sizes of labelled neighbours."""
        total, folded = 1, False
        while self.old and self.old[-1] is not None and not folded:
            size = self.old.pop()
            assert size is not None
            folded = size < 0
            total *= abs(size)
        got: list[int | None] = []
        product = 1
        while product < total or not got:
            if not self.new:
                raise Unknown("puts rows and batch together")
            size = self.new.pop()
            if size is None or size < 0:
                size = total // product // self._further()
            if size < 1 or product * size > total or total % (product * size):
                raise Unknown("cuts rows otherwise than in whole parts")
            product *= size
            got.insert(0, size)
        if folded and not self.new:
            if len(got) > 1:
                raise Unknown("cuts batch and heads otherwise than in whole parts")
            return [-total]
        if folded:
            self.old.append(None)  # the batch that was put together with it
        elif not self.open:
            # a size of 1 that nothing else stands for
            while len(self.new) > len(self.old) and self.new[-1] in (1, -1):
                self.new.pop()
                got.insert(0, 1)
        return got

    def _further(self) -> int:
        """The product of the sizes in front that must be of the same labelled neighbours, for want
        of other dimensions that they could be of."""
        count = 0 if self.open else max(len(self.new) - len(self.old), 0)
        sizes = self.new[len(self.new) - count :]
        return prod(size for size in sizes if size is not None and size > 0)


def indexed(layout: Layout, index: Any) -> Layout:
    """What ``tensor[index]`` has, of numbers, slices, ``None`` and ``...``."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is Ellipsis for entry in entries):
        at = next(n for n, entry in enumerate(entries) if entry is Ellipsis)
        front, back = entries[:at], entries[at + 1 :]
    else:
        front, back = entries, []
    if any(not _is_whole(entry) for entry in front) and layout.open:
        raise Unknown("takes a part of a tensor whose dimensions cannot be counted")
    if layout.open:
        front = []
    found, at = layout, 0
    for entry in front:
        found, at = _entry(found, at, entry)
    dim = len(found.dims) - sum(entry is not None for entry in back)
    for entry in back:
        found, dim = _entry(found, dim, entry)
    return found


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, slice) and entry == slice(None)


def _entry(layout: Layout, at: int, entry: Any) -> tuple[Layout, int]:
    if entry is None:
        return replace(layout, dims=(*layout.dims[:at], None, *layout.dims[at:])), at + 1
    if _is_whole(entry):
        return layout, at + 1
    if at >= len(layout.dims) or at < 0:
        raise Unknown("takes a part of a dimension that cannot be told")
    if isinstance(entry, list) and len(entry) == 1 and isinstance(entry[0], int):
        one = entry[0]
        entry = slice(one, one + 1 or None)
    at_from_end = at - len(layout.dims)
    if isinstance(entry, int):
        return layout.taken(at_from_end, entry), at
    ends = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
    if not all(end is None or isinstance(end, int) for end in ends):
        raise Unknown("takes a part whose ends are computed")
    if layout.dims[at] is None:
        return layout, at + 1  # some positions: rows stay where they are
    return layout.taken(at_from_end, entry), at + 1


def pieces(layout: Layout, dim: int, sizes: Sequence[int]) -> list[Layout]:
    """The parts of a labelled dimension, of these sizes."""
    axis = layout.axis(dim)
    if sum(sizes) != abs(layout.dims[axis] or 0):
        raise Unknown("cuts rows in pieces of sizes that cannot be told")
    found, start = [], 0
    for size in sizes:
        found.append(layout.taken(dim, slice(start, start + size)))
        start += size
    return found


def joined(layouts: Sequence[Layout]) -> Layout:
    """What lies side by side in the last dimension."""
    first = layouts[0]
    if any(not one.is_flat or one.dims[:-1] != first.dims[:-1] for one in layouts):
        raise Unknown("puts rows together otherwise than side by side")
    rows = torch.cat([one.rows for one in layouts])
    return replace(first, dims=(*first.dims[:-1], len(rows)), rows=rows)


def flattened(layout: Layout, start: int, end: int) -> Layout:
    """``flatten(start, end)``."""
    first, last = layout.axis(start), layout.axis(end)
    part = layout.dims[first : last + 1]
    if all(d is None for d in part):
        return replace(layout, dims=(*layout.dims[:first], None, *layout.dims[last + 1 :]))
    if any(d is None or d < 0 for d in part):
        raise Unknown("puts rows and batch together")
    size = prod(d for d in part if d is not None)
    dims = (*layout.dims[:first], size, *layout.dims[last + 1 :])
    shape = [abs(d) for d in dims if d is not None]
    return replace(layout, dims=dims, rows=layout.rows.reshape(shape))


Resolve = Callable[[object], "int | None"]
__all__ = ["Layout", "Resolve", "Rows", "Unknown", "flattened", "indexed", "joined", "pieces"]
