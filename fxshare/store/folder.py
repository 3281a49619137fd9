"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fxshare.errors import StoreError

_MARK = "fxshare.json"


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``path`` to write into, renamed to ``path`` at the end.

    With ``force`` an older folder of ours gives way, and is removed only once the new one has taken
    its place. Whatever fails, the older folder stays and nothing new is left behind.

    Raises :class:`StoreError` where ``path`` is taken or cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    _check_target(path, force)
    made = _missing_parents(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _put_in_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or error
            raise StoreError(f"cannot write {path}: {reason}; nothing was written") from error
        raise


def _check_target(path: Path, force: bool) -> None:
    if not path.name:
        raise StoreError(f"cannot write {path}: expected the name of a folder")
    if not path.exists():
        return
    if not force:
        raise StoreError(f"{path} exists; choose another name, or replace it with force=True")
    if not path.is_dir():
        raise StoreError(f"{path} is a file; force=True replaces only folders of fxshare.save")
    if any(path.iterdir()) and not (path / _MARK).is_file():
        raise StoreError(
            f"{path} has files and no {_MARK}, so fxshare did not make it; force=True replaces "
            "only folders of fxshare.save. Choose another name"
        )


def _missing_parents(path: Path) -> list[Path]:
    """The parents that do not exist yet, innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    older = temporary.with_suffix(".older")
    path.rename(older)
    try:
        temporary.rename(path)
    except OSError:
        os.replace(older, path)
        raise
    shutil.rmtree(older, ignore_errors=True)
