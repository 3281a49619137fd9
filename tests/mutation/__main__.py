"""Change functions one at a time and see whether the tests that call them fail.

``python -m tests.mutation passes --count 40`` (see ``--help``). The tests of a part run once and
say which of them call which function; then each mutant is made in a forked process, by giving the
loaded function other code, and only those tests run, the quickest first, until one fails. On POSIX.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import pytest

from tests.mutation.mutants import Mutant, mutants_of, mutated

ROOT = Path(__file__).parents[2]
PARTS: dict[str, tuple[str, ...]] = {
    "passes": ("tests/passes", "tests/rewriting"),
    "fxshare/planning": ("tests/planning",),
    "fxshare/plans": ("tests/plans", "tests/planning"),
    "fxshare/factors": ("tests/factors", "tests/planning"),
    "fxshare/store": ("tests/store", "tests/loading"),
}
"""What is changed, and the tests that must see it."""
_OPTIONS = ("-q", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no")
Calls = dict[str, dict[str, float]]
"""Tests and their seconds, of every function ``file:qualified.name``."""


class Watch:
    """A plugin of pytest that records which functions of a folder each test calls."""

    def __init__(self, folder: str) -> None:
        self.folder = str(ROOT / folder) + os.sep
        self.calls: Calls = {}
        self.failed: set[str] = set()
        self._seen: set[CodeType] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        """Around each test with its fixtures."""
        self._seen = set()
        start = time.perf_counter()
        sys.setprofile(self._profile)
        try:
            result = yield
        finally:
            sys.setprofile(None)
        seconds = time.perf_counter() - start
        for code in self._seen:
            if code.co_filename.startswith(self.folder):
                name = f"{Path(code.co_filename).relative_to(ROOT)}:{_outermost(code)}"
                self.calls.setdefault(name, {})[item.nodeid] = seconds
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails as it is says nothing about mutants."""
        if report.failed:
            self.failed.add(report.nodeid)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._seen.add(frame.f_code)


def _outermost(code: CodeType) -> str:
    return code.co_qualname.partition(".<locals>")[0]


def _put(mutant: Mutant) -> bool:
    """Give the loaded functions the mutant's code; whether there are such functions."""
    file = ROOT / mutant.file
    line, code = mutated(file, mutant)
    found = False
    for one in gc.get_objects():
        if isinstance(one, FunctionType):
            own = one.__code__
            if (own.co_filename, own.co_qualname) == (str(file), mutant.name):
                assert own.co_firstlineno == line
                try:
                    one.__code__ = code
                except ValueError:  # a variable of an outer function is used no longer
                    return False
                found = True
    return found


def _judge(mutant: Mutant, tests: Sequence[str], limit: float) -> str:
    """``killed``, ``survived``, ``timeout`` or ``not applicable``, from a forked process."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 3
        try:
            if _put(mutant):
                code = int(pytest.main([*_OPTIONS, "-x", *tests]) != 0)
        except BaseException:
            code = 1
        os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            told = {0: "survived", 3: "not applicable"}
            return told.get(os.waitstatus_to_exitcode(status), "killed")
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _chosen(part: str, calls: Calls, count: int | None, seed: int) -> list[Mutant]:
    files = sorted((ROOT / part).rglob("*.py"))
    every = [m for file in files for m in mutants_of(file, str(file.relative_to(ROOT)))]
    called = [m for m in every if f"{m.file}:{m.name}" in calls]
    print(f"{part}: {len(every)} mutants, {len(called)} in functions that tests call", flush=True)
    return called if count is None else random.Random(seed).sample(called, min(count, len(called)))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--count", type=int, help="a random choice of so many mutants a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=60.0, help="seconds of tests for a mutant")
    parser.add_argument("-o", type=Path, help="a line of JSON for every mutant")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for part in given.parts:
        watch = Watch(part)
        pytest.main([*_OPTIONS, *PARTS[part]], plugins=[watch])
        outcomes: dict[str, int] = {}
        for mutant in _chosen(part, watch.calls, given.count, given.seed):
            seconds = watch.calls[f"{mutant.file}:{mutant.name}"]
            tests, total = [], 0.0
            for test in sorted(seconds.keys() - watch.failed, key=lambda t: (seconds[t], t)):
                total += seconds[test]
                if tests and total > given.most:
                    break
                tests.append(test)
            outcome = _judge(mutant, tests, 10 + 5 * total) if tests else "survived"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if outcome == "survived":
                print(f"survived {len(tests)} tests: {mutant}", flush=True)
            if given.o is not None:
                with given.o.open("a") as file:
                    print(json.dumps({**asdict(mutant), "outcome": outcome}), file=file)
        print(f"{part}: {outcomes}", flush=True)


if __name__ == "__main__":
    main()
