"""How much memory is free, before a model is made that may not fit into it."""

from __future__ import annotations

import re
from pathlib import Path

from fxshare.bench.scale.shapes import ModelShape
from fxshare.errors import ConfigError

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Memory that a new process can have, a limit of the control group included; None where the
    system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    left = [] if found is None else [int(found.group(1)) * 1024]
    limit, used = (_number(_CONTROL_GROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        left.append(max(limit - used, 0))
    return min(left, default=None)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no limit is the word "max"
        return None


def check_fits(shape: ModelShape, itemsize: int, dtype: str) -> None:
    """:class:`ConfigError` for a model whose weights alone are more than the memory that is free,
    with both numbers."""
    free, needed = free_bytes(), shape.parameters() * itemsize
    if free is not None and needed > free:
        ways = "fewer --layers" if itemsize < 4 else "--dtype bfloat16 or fewer --layers"
        raise ConfigError(
            f"--shape {shape.name}: the weights of {shape.layers} layers in {dtype} are "
            f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free; give {ways}, or a "
            "smaller shape"
        )


__all__ = ["check_fits", "free_bytes"]
