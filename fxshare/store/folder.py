"""A folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxshare.base.files import aside, swap_in
from fxshare.base.unfinished import settle
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
    settle(path)  # an older folder may be back by it, and is to be refused then
    _check_target(path, force)
    with aside(path) as temporary:
        yield temporary
        swap_in(temporary, path)


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
