"""Where an export goes: it appears whole, checked, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fxshare.errors import StoreError

Ours = Callable[[str], bool]
"""Whether a name in a folder is that of a file that the export writes."""


@contextmanager
def new_place(path: Path, *, force: bool, ours: Ours | None) -> Iterator[Path]:
    """A temporary place of the same name to write into, moved to ``path`` at the end.

    ``ours`` is None for a file; for a folder it says which names may be replaced with it. With
    ``force`` the older target gives way, and only once the new one is complete. Files that the
    writer leaves beside a file target (``model.onnx.data``) move with it. Whatever fails, the
    older target stays and nothing new is left behind.

    Raises :class:`StoreError` where ``path`` is taken or cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    _check_free(path, force, ours)
    made = [parent for parent in path.parents if not parent.exists()]
    # a folder around it: some formats write the file's own name into the file
    around = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    done = False
    try:
        around.mkdir(parents=True)
        yield around / path.name
        _put_in_place(around, path, folder=ours is not None)
        done = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(around, ignore_errors=True)
        for parent in () if done else made:
            with suppress(OSError):
                parent.rmdir()


def _check_free(path: Path, force: bool, ours: Ours | None) -> None:
    if not path.name:
        raise StoreError(f"cannot write {path}: expected the name of a file or folder")
    if not path.exists():
        return
    if not force:
        raise StoreError(f"{path} exists; choose another name, or replace it with force=True")
    if path.is_dir() != (ours is not None):
        found, expected = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise StoreError(
            f"{path} is a {found} and this export is a {expected}; force=True replaces like by "
            "like. Choose another name"
        )
    other = sorted(child.name for child in path.iterdir() if not ours(child.name)) if ours else []
    if other:
        raise StoreError(
            f"{path} holds {other[0]!r}, which an export does not write; force=True replaces only "
            "folders with nothing else in them. Choose another name"
        )


def _put_in_place(around: Path, path: Path, *, folder: bool) -> None:
    made = around / path.name
    if not folder:
        for beside in sorted(around.iterdir()):
            if beside != made:
                os.replace(beside, path.parent / beside.name)
        os.replace(made, path)
    elif not path.exists():
        made.rename(path)
    else:
        older = around / f"{path.name}.older"
        path.rename(older)
        try:
            made.rename(path)
        except OSError:
            os.replace(older, path)
            raise
