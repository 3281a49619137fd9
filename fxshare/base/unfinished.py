"""Names for what is being written, and what becomes of it when its writer has died.

Beside ``out`` lie, each for a moment, ``.out.WRITER.partial`` (being written),
``.out.WRITER.ready`` (complete, about to take its place) and ``.out.WRITER.older`` (what was there
before). ``WRITER`` says which process writes, so that the next one can tell a run that was killed
from one that still works; the names are the journal of a replacement that takes two steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import warnings
import weakref
from pathlib import Path

from fxshare.errors import FxShareWarning

PARTIAL, READY, OLDER = "partial", "ready", "older"
_WRITER = re.compile(r"(?P<host>[0-9a-f]{6})-(?P<pid>[0-9a-f]+)-(?P<start>[0-9a-f]+)-[0-9a-f]{8}")
_NAME = re.compile(rf"\.(?P<name>.+)\.(?P<writer>{_WRITER.pattern})\.(?P<what>partial|ready|older)")


def hidden(path: Path, what: str) -> Path:
    """A new name beside ``path`` that says what it is and which process made it."""
    pid = os.getpid()
    started = _started(pid) or 0
    writer = f"{_host()}-{pid:x}-{started:x}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{writer}.{what}")


def renamed(folder: Path, what: str) -> Path:
    """The name of :func:`hidden` with another ``what``, by the same writer."""
    return folder.with_name(f"{folder.name.rpartition('.')[0]}.{what}")


def settle(path: Path) -> None:
    """Finish or undo what a process that died had begun to write to ``path``, and remove what it
    left; what a living process writes stays.

    Warns where a replacement was broken off between its steps. What cannot be renamed or removed
    stays as it is: whoever reads or writes ``path`` next says why.
    """
    for left in _left(path.parent, path.name).values():
        with contextlib.suppress(OSError):
            _settle(path, left)


def temporary_folder(owner: object) -> Path:
    """A new folder in the system's place for temporary ones (``TMPDIR``), for as long as ``owner``
    lives; those of processes that were killed are removed."""
    path = Path(tempfile.gettempdir()) / "fxshare"
    for left in _left(path.parent, path.name).values():
        for folder in left.values():
            remove(folder)
    folder = hidden(path, PARTIAL)
    folder.mkdir(mode=0o700)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def clear(folder: Path) -> None:
    """Remove files in ``folder`` that processes which died were writing, whatever their names."""
    for left in _left(folder, None).values():
        if set(left) == {PARTIAL}:
            remove(left[PARTIAL])


def remove(path: Path) -> None:
    """Remove a file or folder, as far as that is possible; an interruption waits for it."""
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _settle(path: Path, left: dict[str, Path]) -> None:
    there = os.path.lexists(path)
    began = f"{path}: an earlier run ended in the middle of replacing it; "
    if not there and OLDER in left and READY in left:
        left[READY].rename(path)
        _say(f"{began}the new one was complete and has taken its place now")
    elif not there and OLDER in left:
        left[OLDER].rename(path)
        _say(f"{began}the older one is back in its place")
    elif there and READY in left:
        _say(f"{began}the older one stays, what it wrote is removed")
    for other in left.values():
        remove(other)


def _say(message: str) -> None:
    warnings.warn(message, FxShareWarning, stacklevel=5)


def _left(folder: Path, name: str | None) -> dict[str, dict[str, Path]]:
    """What dead writers left in ``folder`` for ``name`` (or any name), by writer."""
    found: dict[str, dict[str, Path]] = {}
    try:
        there = os.listdir(folder)
    except OSError:
        return found
    for each in there:
        parts = _NAME.fullmatch(each) if each.startswith(".") else None
        if parts is None or name not in (None, parts["name"]) or not _is_dead(parts):
            continue
        found.setdefault(parts["writer"], {})[parts["what"]] = folder / each
    return found


def _is_dead(parts: re.Match[str]) -> bool:
    """Whether the writer has ended. One on another machine, or in another container, cannot be
    seen from here and counts as alive."""
    if parts["host"] != _host() or os.name != "posix":  # elsewhere signal 0 ends a process
        return False
    pid, started = int(parts["pid"], 16), int(parts["start"], 16)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # it is there, and somebody else's
    now = _started(pid)
    return now is not None and now != started


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did: a number that is given again begins
    at another time. 0 for one that has ended and whose parent has not looked; None where the system
    does not say."""
    try:
        # after the name, which may hold anything, in parentheses
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _host() -> str:
    """Which machine and which space of process numbers, as six digits."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:6]


__all__ = ["OLDER", "PARTIAL", "READY", "clear", "hidden", "remove", "renamed", "settle"]
