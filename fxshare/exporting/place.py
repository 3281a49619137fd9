"""Where an export goes: it appears whole, checked, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxshare.base.files import aside, swap_in
from fxshare.base.unfinished import remove, settle
from fxshare.errors import StoreError
from fxshare.exporting.certifying.certificate import NAME as CERTIFICATE

Ours = Callable[[str], bool]
"""Whether a name in a folder is that of a file that the export writes."""
Renames = Callable[[Path, str, str], None]
"""Makes a written file refer to the file beside it by another name: of the file, old, new."""


@contextmanager
def new_place(
    path: Path, *, force: bool, ours: Ours | None, renames: Renames | None = None
) -> Iterator[Path]:
    """A temporary place of the same name to write into, moved to ``path`` at the end.

    ``ours`` is None for a file; for a folder it says which names may be replaced with it. With
    ``force`` the older target gives way, and only once the new one is complete. Files that the
    writer leaves beside a file target (``model.onnx.data``) move with it; where an older file may
    refer to one of that name, they get another (``model.onnx.0a1b2c3d.data``), which ``renames``
    writes into the new file. Whatever fails or ends the process, the older target stays, with what
    it refers to, and nothing new is left behind.

    Raises :class:`StoreError` where ``path`` is taken or cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    settle(path)
    settle(path.with_name(f"{path.name}.{CERTIFICATE}"))
    _check_free(path, force, ours)
    # a folder around it: some formats write the file's own name into the file
    with aside(path) as around:
        yield around / path.name
        if ours is not None:
            swap_in(around / path.name, path)
        else:
            _put_in_place(around, path, renames)


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


def _put_in_place(around: Path, path: Path, renames: Renames | None) -> None:
    """What lies beside the file goes first, under names that nothing refers to yet; the file itself
    is replaced in one step; then what only the older one referred to is removed."""
    made = around / path.name
    beside = sorted(file for file in around.iterdir() if file != made)
    if renames is not None and path.exists():
        beside = [_under_own_name(made, file, renames) for file in beside]
    targets = [path.parent / file.name for file in beside]
    new = [target for target in targets if not target.exists()]
    older = _data_of(path) if renames is not None else []
    try:
        for file, target in zip(beside, targets, strict=True):
            os.replace(file, target)
        os.replace(made, path)
    except BaseException:
        for target in new if made.exists() else ():
            remove(target)
        raise
    finally:
        for file in older if not made.exists() else ():
            if file not in targets:
                remove(file)


def _under_own_name(made: Path, file: Path, renames: Renames) -> Path:
    """Give a file beside ``made`` a name made of its content, so that equal names mean equal
    files."""
    content = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 24):
            content.update(chunk)
    own = file.with_name(f"{made.name}.{content.hexdigest()[:8]}{file.suffix}")
    renames(made, file.name, own.name)
    return file.rename(own)


def _data_of(path: Path) -> list[Path]:
    """Files that an export to ``path`` may have left beside it: those that a killed one moved
    there, and those that the one in place refers to."""
    own = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8}\.)?data")
    found = [file for file in path.parent.iterdir() if own.fullmatch(file.name)]
    plain = path.name + ".data"
    return [file for file in found if path.exists() or file.name != plain]
