"""A cache as it was before a step that turned out to be none of the graph's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_INSIDE = ("layers", "self_attention_cache", "cross_attention_cache")
# layers that never write into their keys and values, or only behind what is in use
_KEEPING = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")


class Rollback:
    """What a cache held. Keys and values that a step replaces, or appends to, are not copied."""

    def __init__(self, cache: Any) -> None:
        self._held = [(part, _copied(part)) for part in _parts(cache)]

    def undo(self) -> None:
        """Put everything back."""
        for part, held in self._held:
            part.__dict__.clear()
            part.__dict__.update(held)


def _parts(cache: Any) -> Iterator[Any]:
    if hasattr(cache, "cross_attention_cache"):
        yield cache
        for inside in (cache.self_attention_cache, cache.cross_attention_cache):
            yield from _parts(inside)
        return
    yield cache
    yield from getattr(cache, "layers", ())


def _copied(part: Any) -> dict[str, Any]:
    keeps = ("keys", "values") if type(part).__name__ in _KEEPING else ()
    held = dict(part.__dict__)
    return {
        name: value if name in keeps or name in _INSIDE else _copy(value)
        for name, value in held.items()
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(one) for one in value)
    return value


__all__ = ["Rollback"]
