"""Write files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fxshare.errors import StoreError


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, then rename.

    Raises :class:`StoreError` naming the path when the disk is full or the folder cannot be
    written; nothing is left behind then.
    """
    # not tempfile: its files are their owner's alone, and stay so after renaming
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write into, gone at the end unless it was renamed.

    Parents of ``path`` are made, and removed again where something fails. Raises
    :class:`StoreError` naming ``path`` for what the disk or safetensors refuses.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    folder = _hidden(path, "partial")
    done = False
    try:
        folder.mkdir(parents=True)
        yield folder
        done = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in () if done else made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def swap_in(folder: Path, path: Path) -> None:
    """Rename a folder to ``path``. An older one there is removed only once the new one has taken
    its place, and comes back where that fails."""
    if not path.exists():
        folder.rename(path)
        return
    older = _hidden(path, "older")
    path.rename(older)
    try:
        folder.rename(path)
    except OSError:
        os.replace(older, path)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _hidden(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{what}")
