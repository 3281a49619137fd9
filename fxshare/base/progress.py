"""What is going on: a line for each stage through ``logging``, and on a terminal progress bars.

No handler is installed here and no level is set: who uses the library decides what is shown.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fxshare.base.processes import here
from fxshare.base.spent import part

T = TypeVar("T")


class Stage:
    """A stage that is running, to which what it found can be said."""

    def __init__(self) -> None:
        self._found = ""

    def found(self, what: str) -> None:
        """Say ``what`` in the line at the end of the stage. Names and counts, never a path."""
        self._found = f" ({what})"

    @property
    def remark(self) -> str:
        """What was found, in parentheses; empty where nothing was said."""
        return self._found


@contextmanager
def stage(name: str, log: logging.Logger) -> Iterator[Stage]:
    """Log ``name: started`` and ``name: done in 1.2 s (what was found)``, as information.

    A stage that an error or Ctrl-C ends is never done: its line says ``name: stopped after 1.2 s``.
    As a decorator it makes a stage of every call. What it takes is recorded where somebody records
    (:mod:`fxshare.base.spent`).
    """
    running = Stage()
    log.info("%s: started", name)
    start = time.perf_counter()
    try:
        with part(name):
            yield running
    except BaseException:
        log.info("%s: stopped after %.1f s", name, time.perf_counter() - start)
        raise
    log.info("%s: done in %.1f s%s", name, time.perf_counter() - start, running.remark)


def track(items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
    """Yield ``items``; show ``what``, a bar and the time left on stderr when it is a terminal."""
    if not (sys.stderr.isatty() and here().is_first):
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        yield from bar.track(items, total=total, description=what)
