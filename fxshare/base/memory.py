"""How much memory there is, and how sizes are written."""

from __future__ import annotations

from pathlib import Path

import psutil

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


def shown(size: float) -> str:
    """``1.2 GB``, ``340 MB``: decimal units."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


__all__ = ["free", "resident", "shown"]
