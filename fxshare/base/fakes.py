"""Operations on fake tensors that may fail: torch writes a traceback to stderr of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = "torch._subclasses.fake_tensor"
_FAILURES = ("failed while attempting to run meta", "fake tensor raised")


class _Unsaid(logging.Filter):
    """Drops what torch says of failures in one thread; what is raised says it again."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.thread == self._thread
        return not (ours and record.getMessage().startswith(_FAILURES))


@contextmanager
def failures_unsaid() -> Iterator[None]:
    """Keep tracebacks of fake tensors in this thread out of torch's log, for a while."""
    log, unsaid = logging.getLogger(_LOGGER), _Unsaid()
    log.addFilter(unsaid)
    try:
        yield
    finally:
        log.removeFilter(unsaid)


__all__ = ["failures_unsaid"]
