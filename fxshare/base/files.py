"""Write files and folders whole or not at all, whatever ends the process in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fxshare.base.exchange import exchange
from fxshare.base.unfinished import OLDER, PARTIAL, READY, hidden, remove, renamed, settle
from fxshare.errors import StoreError


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, then rename.

    Raises :class:`StoreError` naming the path when the disk is full or the folder cannot be
    written; nothing is left behind then, nor by an interruption. What a killed run left of the same
    file is removed.
    """
    path = path.resolve() if path.is_symlink() else path
    settle(path)
    # not tempfile: its files are their owner's alone, and stay so after renaming
    temporary = hidden(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        remove(temporary)
        raise


def check_writable(path: Path) -> None:
    """:class:`StoreError` where a file of this name could not be written, to be asked before long
    work: a temporary file is made beside it, or in the nearest folder that there is."""
    if path.is_dir():
        raise StoreError(f"cannot write {path}: it is a folder; give the name of a file")
    check_place(path)


def check_place(path: Path) -> None:
    """:class:`StoreError` where nothing could be made, or replaced, by the name ``path``."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(f"cannot write {path}: {folder}: {error.strerror or error}") from error


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write into, gone at the end unless it was renamed.

    Parents of ``path`` are made, and removed again where something fails. What a killed run left
    is settled first. Raises :class:`StoreError` naming ``path`` for what the disk or safetensors
    refuses.
    """
    settle(path)
    made = [parent for parent in path.parents if not parent.exists()]
    folder = hidden(path, PARTIAL)
    done = False
    try:
        folder.mkdir(parents=True)
        yield folder
        done = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        remove(folder)
        for parent in () if done else made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def swap_in(folder: Path, path: Path) -> None:
    """Give the folder that :func:`aside` made, or one inside of it, the name ``path``.

    An older one there is exchanged for it in one step where the file system can. Elsewhere in two,
    under names by which the next run finishes or undoes what was broken off between them; an error
    or an interruption undoes it at once.
    """
    if not path.exists():
        folder.rename(path)
    elif exchange(folder, path):
        remove(folder)
    else:
        _in_two_steps(folder, path)


def _in_two_steps(folder: Path, path: Path) -> None:
    ready = hidden(path, READY)
    older = renamed(ready, OLDER)
    try:
        folder.rename(ready)
        path.rename(older)
        ready.rename(path)
    except BaseException:
        if not path.exists() and older.exists():
            os.replace(older, path)
        remove(ready)
        raise
    finally:
        if path.exists():
            remove(older)


__all__ = ["aside", "check_place", "check_writable", "swap_in", "write_bytes", "write_text"]
