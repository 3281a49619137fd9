"""Files that only save time: an entry is what was written, or it is not there.

An entry begins with a hash over its key and its content. One that is damaged, cut off, of another
key, or unreadable counts as missing, so that a cache can cost time and never change a result.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from fxshare.base.files import write_bytes
from fxshare.base.processes import here
from fxshare.base.unfinished import clear
from fxshare.errors import FxShareWarning, StoreError

_HASH = hashlib.sha256().digest_size


def read_entry(folder: Path, key: str) -> bytes | None:
    """The content that :func:`write_entry` wrote under ``key``; None where it is not there."""
    try:
        found = (folder / key).read_bytes()
    except OSError:
        return None
    content = found[_HASH:]
    return content if found[:_HASH] == _digest(key, content) else None


def write_entry(folder: Path, key: str, content: bytes) -> None:
    """Keep ``content`` under ``key``, whole or not at all; several processes may write at once. Of
    those that share one piece of work the first does.

    ``key`` is a plain file name. Where it cannot be written nothing is kept, with an
    :class:`FxShareWarning` that says why.
    """
    if not here().is_first:
        return
    clear(folder)  # of whatever key: nobody may ever ask for the same again
    try:
        write_bytes(folder / key, _digest(key, content) + content)
    except StoreError as error:
        warnings.warn(f"nothing is kept for the next time: {error}", FxShareWarning, stacklevel=2)


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).digest()


__all__ = ["read_entry", "write_entry"]
