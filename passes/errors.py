"""The root of the project's errors, and those of the pass library.

The root lives here because imports point from ``fxshare`` to ``passes``: every error that either
package raises on purpose is a :class:`FxShareError`, so one ``except`` clause catches them all.
"""

from __future__ import annotations

import re

# no path and no name that somebody gave is as long; what a damaged or hostile file says may be
_LONG = re.compile(r"\S{600,}")


class FxShareError(Exception):
    """Base of every error raised on purpose. The message names the subject, what was expected,
    what was found, and the way out. Endless words in it, found in a file, are shown in part."""

    def __str__(self) -> str:
        return _LONG.sub(_in_part, super().__str__())


def _in_part(found: re.Match[str]) -> str:
    word = found.group()
    return f"{word[:80]}…{word[-40:]} ({len(word)} characters)"


class PassError(FxShareError):
    """A pass could not do its work, or was misused."""


class RequiresError(PassError):
    """The graph given to a pass does not meet the pass's ``requires``."""


class EnsuresError(PassError):
    """The graph that a pass made breaks its ``ensures`` or an invariant of the runner."""


class NameFault(PassError):
    """A name of a submodule, a tensor or an argument that no generated code can hold."""


class ShapeError(PassError):
    """A tensor handed to a pass does not have the shape that its site needs."""


class DialectError(PassError):
    """A graph has something that is not legal at its stage (:mod:`passes.dialect`)."""
