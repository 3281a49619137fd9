"""Whether a disk has room for what will be written, before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from fxshare.base.memory import shown
from fxshare.errors import StoreError


def check_room(folder: Path, needed: int, what: str, way_out: str) -> None:
    """Refuse a folder whose disk has fewer than ``needed`` bytes free; what is in it already counts
    for them.

    Raises :class:`StoreError` with the sizes and the way out.
    """
    there = 0
    if folder.is_dir():
        there = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed - there > free:
        raise StoreError(
            f"{folder}: about {shown(needed - there)} of {what} go there, and {shown(free)} are "
            f"free; {way_out}"
        )


__all__ = ["check_room"]
