"""One capture where several are asked for: what proposes a configuration looks at the graph that is
compiled then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshare.capture.captured import Captured


@dataclass(frozen=True)
class _Kept:
    model: nn.Module
    how: object
    example: object
    captured: Captured


@dataclass(frozen=True)
class Captures:
    """The captures of one :func:`captures_kept`."""

    _kept: list[_Kept] = field(default_factory=list)

    def find(self, model: nn.Module, how: object, example: object) -> Captured | None:
        """That of this model on an equal example, asked for alike; None where there is none."""
        for one in self._kept:
            if one.model is model and one.how == how and _equal(one.example, example):
                return one.captured
        return None

    def keep(self, model: nn.Module, how: object, example: object, captured: Captured) -> None:
        """Keep one to be found."""
        self._kept.append(_Kept(model, how, example, captured))


_KEPT: ContextVar[Captures | None] = ContextVar("captures", default=None)


@contextmanager
def captures_kept() -> Iterator[None]:
    """Inside, a model that is captured again on an equal example is not captured again. It must not
    change meanwhile."""
    token = _KEPT.set(Captures())
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept() -> Captures:
    """Those that are kept at present; outside of :func:`captures_kept` some that nobody keeps."""
    return _KEPT.get() or Captures()


def _equal(one: object, other: object) -> bool:
    left, tree = pytree.tree_flatten(one)
    right, other_tree = pytree.tree_flatten(other)
    return tree == other_tree and all(map(_same, left, right))


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        return alike and a.device.type != "meta" and bool(a.equal(b))
    # of other objects, arrays say, equality may mean anything
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


__all__ = ["captures_kept", "kept"]
