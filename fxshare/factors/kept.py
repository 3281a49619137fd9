"""What is kept of earlier computations, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by key; those that were not asked for longest go when there are too many. The value
    asked for last is always kept.

    With ``stays`` what is kept stays, and of what then finds no room only the last is kept: of
    values that are asked for in turn, again and again, as many as there is room for are found,
    where otherwise each would be gone just before its turn. With ``stays`` values above ``largest``
    bytes, which would take the place of many others, count as finding no room.
    """

    def __init__(self, most_bytes: int, *, stays: bool = False, largest: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.stays = stays
        self.largest = most_bytes if largest is None else largest
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._bytes = 0
        self._last: tuple[Hashable, Value] | None = None
        """What found no room."""

    def get(self, key: Hashable, make: Callable[[], Value], size: int) -> Value:
        """The value of a key; made where it is not kept, and then kept as ``size`` bytes."""
        if key not in self._values:
            if self.stays and (self._bytes + size > self.most_bytes or size > self.largest):
                if self._last is None or self._last[0] != key:
                    self._last = None  # before there is another
                    self._last = key, make()
                return self._last[1]
            self._drop(size)  # before there is another
            self._values[key] = make(), size
            self._bytes += size
        self._values.move_to_end(key)
        return self._values[key][0]

    def found(self, key: Hashable) -> Value | None:
        """The value of a key, None where it is not kept."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def has_room(self, size: int) -> bool:
        """Whether a value of so many bytes can be kept among others."""
        return size <= min(self.largest, self.most_bytes)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def clear(self, share: float = 1.0) -> None:
        """Keep nothing, and from now on that share of the bytes."""
        self._values.clear()
        self._bytes, self._last = 0, None
        self.most_bytes, self.largest = int(share * self.most_bytes), int(share * self.largest)

    def _drop(self, wanted: int) -> None:
        while self._values and self._bytes + wanted > self.most_bytes:
            _, (_, size) = self._values.popitem(last=False)
            self._bytes -= size
