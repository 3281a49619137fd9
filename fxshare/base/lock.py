"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fxshare.errors import StoreError

NAME = "lock"


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends.

    Raises :class:`StoreError` at once where another one holds it, with its number.
    """
    try:
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        if not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another one"
            raise StoreError(
                f"{folder} is in use by process {holder}; wait for its end, or give another folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: two runs at once are the user's to avoid there
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


__all__ = ["only_here"]
