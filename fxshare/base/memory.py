"""How much memory there is, and how sizes are written."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from pathlib import Path

import psutil

_LARGE = 1 << 20
_MUCH = 1 << 29
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def free() -> int:
    """Bytes that this process can still take without swapping: the machine's, or those of the
    container that it runs in."""
    found = int(psutil.virtual_memory().available)
    for most, used in _CGROUPS:
        try:
            left = int(Path(most).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        found = min(found, max(left, 0))
    return found


def give_back(size: int = _LARGE) -> None:
    """Free what only refers to itself, which graphs do, and hand freed memory to the system where
    the C library keeps it (glibc's ``malloc_trim``). Of a small ``size``, that of the weights at
    work, nothing is done: to look through all objects takes longer than to plan for a small model.

    Matrices of a few megabytes that come and go between others leave its heap in pieces, which it
    keeps: without this a process of many trials grows although nothing is held.
    """
    if size >= _LARGE:
        gc.collect()
        trim()


def trim(above: int | None = None) -> None:
    """Hand memory that is free already to the system, as :func:`give_back` does; with ``above``
    only where half a gigabyte more than that is resident."""
    if above is not None and resident() - above < _MUCH:
        return
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None


def shown(size: float) -> str:
    """``1.2 GB``, ``340 MB``: decimal units."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


__all__ = ["free", "give_back", "resident", "shown", "trim"]
