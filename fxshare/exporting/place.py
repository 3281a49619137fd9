"""Where an export goes: it appears whole, checked, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxshare.base.files import aside, swap_in
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
    # a folder around it: some formats write the file's own name into the file
    with aside(path) as around:
        yield around / path.name
        _put_in_place(around, path, folder=ours is not None)


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
    else:
        swap_in(made, path)
