"""Whether tests notice a mutant, in a forked process."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType

import pytest

from tests.mutation.mutants import Mutant, mutated
from tests.mutation.watch import clear_caches

OPTIONS = (
    *("-q", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-W", "ignore"),
    *("-o", "addopts=--strict-markers -m 'not slow'", "--hypothesis-seed=0"),
)
"""Of pytest. Workers would not have the mutant's code."""
Places = Mapping[tuple[str, str, int], Sequence[FunctionType]]
"""Loaded functions by file, qualified name and first line."""


def functions_by_place(folder: str) -> Places:
    """The loaded functions whose code is in a folder."""
    gc.unfreeze()  # the suite freezes what was imported, and frozen objects are not listed
    clear_caches()
    found: dict[tuple[str, str, int], list[FunctionType]] = {}
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename.startswith(folder + os.sep):
            code = one.__code__
            place = (code.co_filename, code.co_qualname, code.co_firstlineno)
            found.setdefault(place, []).append(one)
    gc.collect()
    gc.freeze()  # else each forked process writes to every page when it collects
    return found


def put(root: Path, mutant: Mutant, places: Places) -> bool:
    """Give the loaded functions the mutant's code; whether there are such functions."""
    line, code = mutated(root / mutant.file, mutant)
    found = places.get((str(root / mutant.file), mutant.name, line), ())
    for one in found:
        try:
            one.__code__ = code
        except ValueError:  # a variable of an outer function is used no longer
            return False
    return bool(found)


def judge(root: Path, mutant: Mutant, tests: Sequence[str], *, limit: float, places: Places) -> str:
    """``killed``, ``survived``, ``timeout`` (of seconds) or ``not applicable``."""
    if not tests:
        return "survived"
    child = os.fork()
    if child == 0:
        os._exit(_verdict(root, mutant, tests, places))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            told = {0: "survived", 3: "not applicable"}
            return told.get(os.waitstatus_to_exitcode(status), "killed")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _verdict(root: Path, mutant: Mutant, tests: Sequence[str], places: Places) -> int:
    """In the child: 0 where every test passes, 1 where one fails, 3 without such a function
    or test."""
    os.setpgid(0, 0)  # what tests start ends with the child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        if not put(root, mutant, places):
            return 3
        told = pytest.main([*OPTIONS, "-x", *tests])
        if told in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            return 3  # tests that are there no longer
        return int(told != pytest.ExitCode.OK)
    except BaseException:  # a mutant may raise whatever it likes
        return 1
