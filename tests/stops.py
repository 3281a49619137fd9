"""A process that is stopped before one of its operations on files.

:func:`run` forks this process, which has everything loaded, and lets the copy work; before the
operation with a given number that touches ``folder`` it sends itself a signal. :func:`everywhere`
does the work once: before every operation the copy forks twice, one of these is killed and the
other interrupted there, and what each left is kept aside. Operations are what
Python's audit events say (open for writing, rename, mkdir, remove, rmdir, truncate, link, symlink),
and what is written without them: exchanged names, fsync, files of safetensors and of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fxshare.base import files

_CHANGES = frozenset(
    {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Ended:
    """How a copy ended: ``code`` of the process (negative: the signal), the operations that it
    began, and the traceback of an error that was not the interruption."""

    code: int
    operations: tuple[str, ...]
    error: str


class _Operations:
    def __init__(
        self, folder: Path, at: int | None, how: int, pipe: int, kept: Path | None
    ) -> None:
        self.folder, self.at, self.how, self.pipe = os.fspath(folder), at, how, pipe
        self.kept = kept
        self.count = 0
        self.busy = False

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        if name == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES:
                self.before(name, path)
        elif name in _CHANGES:
            at = arguments[-1] if isinstance(arguments[-1], int) else -1
            self.before(name, arguments[0], at)

    def before(self, name: str, path: Any, dir_fd: int = -1) -> None:
        self.busy = True
        try:
            place = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if dir_fd >= 0 and not os.path.isabs(place):
                place = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), place)
            if not place.startswith(self.folder):
                return
            os.write(self.pipe, f"{name} {place[len(self.folder) :]}\n".encode())
            self.count += 1
            stop = self.count - 1 == self.at
        finally:
            self.busy = False
        if stop:
            os.kill(os.getpid(), self.how)
        if self.kept is not None:
            self._stop_here(self.kept)

    def _stop_here(self, kept: Path) -> None:
        """Let copies of this process be stopped here, and keep what each of them leaves."""
        self.busy = True
        folder, number = Path(self.folder), self.count - 1
        before = kept / f"{number}.before"
        shutil.copytree(folder, before, symlinks=True)
        for how in (signal.SIGKILL, signal.SIGINT):
            pid = os.fork()
            if pid == 0:
                os.kill(os.getpid(), how)  # an interruption goes on from here, as an exception
                return
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            shutil.copytree(folder, kept / f"{number}.{how.name}.{code}", symlinks=True)
            for child in folder.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            shutil.copytree(before, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(before)
        self.busy = False


def run(
    work: Callable[[], object],
    folder: Path,
    *,
    at: int | None = None,
    how: int = signal.SIGKILL,
    exchanging: bool = True,
) -> Ended:
    """Let a copy of this process do ``work``, stopped before operation ``at`` if any. Without
    ``exchanging`` its file system cannot exchange two names."""
    return _run(work, folder, at, how, exchanging, None)


def everywhere(
    work: Callable[[], object], folder: Path, kept: Path, *, exchanging: bool = True
) -> Ended:
    """Let a copy of this process do ``work`` once, and stop copies of it before every operation:
    ``kept`` then has a folder ``NUMBER.SIGNAL.CODE`` for each, as it was left."""
    return _run(work, folder, None, signal.SIGKILL, exchanging, kept)


def _run(
    work: Callable[[], object],
    folder: Path,
    at: int | None,
    how: int,
    exchanging: bool,
    kept: Path | None,
) -> Ended:
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(work, _Operations(folder, at, how, write, kept), exchanging)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    operations, _, error = said.partition("\0")
    return Ended(os.waitstatus_to_exitcode(status), tuple(operations.splitlines()), error)


def _child(work: Callable[[], object], operations: _Operations, exchanging: bool) -> None:
    code = 1
    try:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        with contextlib.ExitStack() as patched:
            if operations.kept is not None:
                # by names: folders are made anew between operations, and an open one is the old
                patched.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))
            for patch in _unseen(operations, exchanging):
                patched.enter_context(patch)
            sys.addaudithook(operations.event)
            work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        operations.busy = True
        os.write(operations.pipe, b"\0" + traceback.format_exc().encode())
    finally:
        os._exit(code)


def _unseen(operations: _Operations, exchanging: bool) -> list[Any]:
    """What writes without an audit event, with one."""
    import safetensors.torch

    def seen(name: str, call: Callable[..., Any], path: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            operations.before(name, path(*arguments))
            return call(*arguments, **options)

        return made

    exchange = files.exchange if exchanging else lambda *_: False
    places: list[tuple[Any, str, Any, Callable[..., Any]]] = [
        (files, "exchange", exchange, lambda one, other: other),
        (os, "fsync", os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd}")),
        (
            safetensors.torch,
            "serialize_file",
            safetensors.torch.serialize_file,
            lambda tensors, name, *_: name,
        ),
        (
            torch._C,
            "PyTorchFileWriter",
            torch._C.PyTorchFileWriter,
            lambda target, *_: target if isinstance(target, str) else "",
        ),
    ]
    return [mock.patch.object(at, name, seen(name, call, p)) for at, name, call, p in places]
