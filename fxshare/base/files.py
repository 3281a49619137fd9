"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

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
