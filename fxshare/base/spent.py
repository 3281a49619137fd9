"""What each stage takes: processor seconds, and the most memory that was held during it.

Nothing is measured unless somebody records: ``with recording() as spent: ...``, and after it
``spent.stages()``.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

OTHER = "other"
"""The stage of what is in none."""


@dataclass(frozen=True)
class Spent:
    """All runs of one stage. Seconds and memory are its own: what a stage inside of it takes is
    that one's, so that the sum of the seconds is the whole."""

    name: str
    runs: int
    cpu_seconds: float
    seconds: float
    peak_bytes: int
    """The most resident memory of the process while the stage itself ran; where the system cannot
    forget a peak (other than Linux), what it had been until then at most."""


class Recording:
    """The account of one :func:`recording`."""

    def __init__(self) -> None:
        self._found: dict[str, Spent] = {}
        self._running = [(OTHER, False)]
        _forget_peak()
        self._last = _now()

    def stages(self) -> tuple[Spent, ...]:
        """What was spent until the end of the recording, in the order in which the stages began;
        what was in none of them comes last, as :data:`OTHER`."""
        found = dict(self._found)
        other = found.pop(OTHER)
        return (*found.values(), other)

    @contextmanager
    def _inside(self, name: str, whole: bool) -> Iterator[None]:
        if self._running[-1][1]:  # what is inside of a whole part is its own
            yield
            return
        self._settle(0)
        self._running.append((name, whole))
        self._settle(0)  # its place in the order is where it began
        try:
            yield
        finally:
            self._settle(1)
            self._running.pop()

    def _settle(self, runs: int) -> None:
        """Whatever was spent since the last time is that of the innermost stage."""
        now = _now()
        name = self._running[-1][0]
        cpu, wall = (a - b for a, b in zip(now, self._last, strict=True))
        old = self._found.get(name, Spent(name, 0, 0.0, 0.0, 0))
        self._found[name] = Spent(
            name,
            old.runs + runs,
            old.cpu_seconds + cpu,
            old.seconds + wall,
            max(old.peak_bytes, peak_bytes()),
        )
        _forget_peak()
        self._last = now


# none is running unless somebody asks; a thread that is started has none
_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what the stages and parts inside take, and nothing outside of it.

    On Linux the kernel's mark of the process's peak starts anew with every stage.
    """
    made = Recording()
    token = _RECORDING.set(made)
    try:
        yield made
    finally:
        made._settle(1)
        _RECORDING.reset(token)


@contextmanager
def part(name: str, *, whole: bool = False) -> Iterator[None]:
    """A part of a stage that is recorded by itself, and not logged: it may run thousands of times.

    As a decorator it makes a part of every call. ``whole`` counts what runs inside as its own.
    """
    running = _RECORDING.get()
    if running is None:
        yield
        return
    with running._inside(name, whole):
        yield


def peak_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not tell.

    Not ``ru_maxrss`` on Linux: a process that was started by another has that one's memory at the
    start counted in it, although none of it is its own.
    """
    with contextlib.suppress(OSError):
        found = re.search(rb"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_bytes())
        if found is not None:
            return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        # proc(5): the peak becomes what is resident now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


__all__ = ["OTHER", "Recording", "Spent", "part", "peak_bytes", "recording"]
