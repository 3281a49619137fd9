"""The lines about stages and passes on stderr, for the time of one command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import fxshare

_LOGGERS = ("fxshare", "passes")


class _Lines(logging.Handler):
    """One plain line a record, on what stderr is at that moment: a progress bar puts itself in its
    place, and what is written there then appears above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def stages_shown(*, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Show stages in a pipe, where there is no progress bar; with ``verbose`` on a terminal as
    well, and passes; with ``quiet`` nothing. Afterwards logging is as it was, whatever happened.

    Raises :class:`ConfigError` where both are asked for.
    """
    if verbose and quiet:
        raise fxshare.errors.ConfigError(
            "--verbose and --quiet: expected one of the two, found both; leave one out"
        )
    if quiet or (sys.stderr.isatty() and not verbose):
        yield
        return
    with ExitStack() as afterwards:
        lines = _Lines()
        for name in _LOGGERS:
            log = logging.getLogger(name)
            afterwards.callback(log.setLevel, log.level)
            log.setLevel(logging.DEBUG if verbose else logging.INFO)
            afterwards.callback(log.removeHandler, lines)
            log.addHandler(lines)
        yield
