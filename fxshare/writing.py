"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fxshare.errors import StoreError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 under a temporary name, then rename.

    Raises :class:`StoreError` naming the path when the disk is full or the folder cannot be
    written; nothing is left behind then.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
