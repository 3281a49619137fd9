"""Which functions of a folder each test calls."""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

Calls = dict[str, dict[str, float]]
"""Tests and their seconds, of every function ``file:qualified.name``."""


class Watch:
    """A plugin of pytest that records which functions of a folder each test calls.

    What a fixture calls counts for every test that asks for the fixture, not only for the first.
    A trace function that traces no lines costs less than a profile function, which is told of
    every call into C as well.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self._root = root
        self._folder = str(root / folder) + os.sep
        self._calls: Calls = {}
        self._failed: set[str] = set()
        self._seen: set[CodeType] = set()
        self._by_fixture: dict[object, set[CodeType]] = {}

    def told(self) -> Calls:
        """The calls of the tests that pass."""
        return {
            name: {test: took for test, took in tests.items() if test not in self._failed}
            for name, tests in self._calls.items()
        }

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Around each test with its fixtures."""
        clear_caches()
        self._seen = set()
        start = time.perf_counter()
        sys.settrace(self._trace)
        try:
            result = yield
        finally:
            sys.settrace(None)
        seconds = time.perf_counter() - start
        asked = getattr(item, "_fixtureinfo", None)
        for definitions in asked.name2fixturedefs.values() if asked is not None else ():
            for one in definitions:
                self._seen |= self._by_fixture.get(one, set())
        for code in self._seen:
            if code.co_filename.startswith(self._folder):
                name = f"{Path(code.co_filename).relative_to(self._root)}:{_outermost(code)}"
                self._calls.setdefault(name, {})[item.nodeid] = seconds
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        """Around each fixture when it is made."""
        before, self._seen = self._seen, set()
        try:
            return (yield)
        finally:
            self._by_fixture[fixturedef] = self._seen
            self._seen = before | self._seen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails as it is, or under the trace, says nothing about mutants."""
        if report.failed or report.skipped:
            self._failed.add(report.nodeid)

    def _trace(self, frame: FrameType, _event: str, _: object) -> None:
        self._seen.add(frame.f_code)


def clear_caches() -> None:
    """Forget what functions of ours and of the tests have kept: a kept result calls nothing."""
    for one in gc.get_objects():
        if type(one) is functools._lru_cache_wrapper:
            module = getattr(one, "__module__", "") or ""
            if module.partition(".")[0] in ("fxshare", "passes", "tests"):
                one.cache_clear()


def _outermost(code: CodeType) -> str:
    return code.co_qualname.partition(".<locals>")[0]
