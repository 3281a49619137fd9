"""How much is summed up at a time, and where the sums go."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fxshare.base.memory import shown
from fxshare.base.unfinished import temporary_folder
from fxshare.errors import CalibrationError


@dataclass(frozen=True)
class Keeping:
    """Where statistics are kept.

    ``most_bytes`` bounds the sums that are in memory at a time; ``folder`` is where they are
    written, or None for memory. ``owner`` is what the folder's life hangs on. With ``offload`` the
    activations that a backward pass needs are in a file until then.
    """

    most_bytes: int | None = None
    folder: Path | None = None
    owner: object = None
    offload: bool = False

    def told(self, needed: int, passes: int, found: int = 0) -> str:
        """What is about to be done, in a line; ``found`` parts are there already."""
        where = "in memory" if self.folder is None else "on disk"
        times = "one pass" if passes == 1 else f"{passes} passes"
        already = f"; {found} parts are there already" if found else ""
        return f"statistics of {shown(needed)} {where}, {times} over the data{already}"


IN_MEMORY = Keeping()


def has_room(needed: int) -> bool:
    """Whether a :class:`Scratch` of so many bytes can be made."""
    return shutil.disk_usage(tempfile.gettempdir()).free >= needed


class Scratch:
    """A folder for as long as it is needed, in the system's place for temporary ones (``TMPDIR``).

    Raises :class:`CalibrationError` where fewer than ``needed`` bytes are free there.
    """

    def __init__(self, needed: int) -> None:
        at = tempfile.gettempdir()
        free = shutil.disk_usage(at).free
        if free < needed:
            raise CalibrationError(
                f"{shown(needed)} of statistics go to disk to keep to max_memory, and {at} "
                f"has {shown(free)} free; set TMPDIR to a larger one, or raise max_memory"
            )
        self.path = temporary_folder(self)


__all__ = ["IN_MEMORY", "Keeping", "Scratch", "has_room"]
