"""Regular expressions of a configuration, matched in a bounded time.

Most patterns take a time that grows slowly with a name's length: they are Python's own ``re``. One
that repeats what repeats, or repeats a choice, may try exponentially many ways before it gives up;
``re`` cannot be stopped, so such a pattern is matched by ``regex``, which takes a time limit.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from typing import Any

import regex

from fxshare.errors import ConfigError
from passes.graph.names import shortened

# as `re` itself reads a pattern; no public module tells
if sys.version_info >= (3, 11):
    from re import _parser  # type: ignore[attr-defined]
else:
    import sre_parse as _parser

SECONDS = 1.0
"""For all the names of a model together."""
_MOST_REPEATS = 4
"""So many open repeats, one after the other, take a name's length to that power at the worst."""


class Pattern:
    """A pattern, compiled, with the time that is left to match it.

    ``match`` and ``search`` are those of ``re``. Raises :class:`ConfigError` naming the pattern
    where the time is over.
    """

    def __init__(self, pattern: str, *, seconds: float = SECONDS) -> None:
        self.pattern = pattern
        self._left = seconds
        self._compiled: Any = re.compile(pattern)
        self._is_slow = may_backtrack(pattern)
        if self._is_slow:
            try:
                self._compiled = regex.compile(pattern)
            except regex.error as error:
                raise ConfigError(
                    f"pattern {shortened(pattern)} repeats what repeats, and cannot be matched in "
                    f"a limited time ({error}); write it with simpler repeats"
                ) from error

    def match(self, name: str) -> Any:
        """``re.match`` on a name; None where it does not match."""
        return self._run(self._compiled.match, name)

    def search(self, name: str) -> Any:
        """``re.search`` in a name; None where it is not found."""
        return self._run(self._compiled.search, name)

    def _run(self, method: Any, name: str) -> Any:
        if not self._is_slow:
            return method(name)
        start = time.monotonic()
        try:
            found = method(name, timeout=max(self._left, 0.001))
        except TimeoutError:
            raise ConfigError(
                f"pattern {shortened(self.pattern)} takes too long on {shortened(name)}: it "
                "repeats what repeats, and tries every way to divide the name; expected a pattern "
                r"such as '.*\.attn\.c_attn$', without one repeat inside another"
            ) from None
        self._left -= time.monotonic() - start
        return found


def may_backtrack(pattern: str) -> bool:
    """Whether matching may take long: a repeat inside another or around a choice, more than
    4 repeats, or a reference to an earlier group."""
    repeats = 0
    stack: list[tuple[Any, bool]] = [(_parser.parse(pattern), False)]
    while stack:
        node, inside = stack.pop()
        if isinstance(node, _parser.SubPattern):
            stack += [(one, inside) for one in node.data]
            continue
        if not isinstance(node, tuple):
            if isinstance(node, list):
                stack += [(one, inside) for one in node]
            continue
        kind = str(node[0])
        if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = node[1]
            repeats += int(most) > 1
            if inside or repeats > _MOST_REPEATS:
                return True
            stack.append((body, inside or int(most) > 1))
        elif (kind == "BRANCH" and inside) or kind == "GROUPREF":
            return True
        elif kind != "IN":
            stack.extend((one, inside) for one in _parts(node[1]))
    return False


def _parts(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


__all__ = ["Pattern", "may_backtrack"]
