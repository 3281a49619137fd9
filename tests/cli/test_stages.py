"""Stages on the command line: shown in a pipe and with ``-v``, gone afterwards."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fxshare.cli import main
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
COMPILE = ("compile", "cli_toy:make", "-c", "sharing.yaml", "--calibration", "ids.npy")
COMPILE += ("--length", "20")
STAGES = ("load", "match", "capture", "plan", "calibrate", "factorise", "rewrite", "verify")
LINE = re.compile(r"[a-z]+: (started|done in \d+\.\d s( \(.+\))?)")


def state() -> list[tuple[int, list[logging.Handler]]]:
    """What a command must leave as it was."""
    return [
        (log.level, list(log.handlers)) for log in map(logging.getLogger, ("fxshare", "passes"))
    ]


def said(ran: Ran) -> list[str]:
    """The lines on stderr without what the model's own code prints."""
    return [line for line in ran.err.splitlines() if line != "the factory talks"]


def test_a_pipe_shows_stages_and_stdout_the_result_alone(fxshare: Run) -> None:
    before = state()
    ran, silent = fxshare(*COMPILE, "--json"), fxshare(*COMPILE, "--json", "--quiet")
    assert (ran.code, silent.code) == (0, 0), ran.err
    assert all(LINE.fullmatch(line) for line in said(ran)), ran.err
    started = [line.partition(":")[0] for line in said(ran) if line.endswith(": started")]
    ended = [line.partition(":")[0] for line in said(ran) if ": done in " in line]
    assert tuple(started) == tuple(ended) == STAGES
    assert said(silent) == []
    assert ran.json.keys() == silent.json.keys()  # one JSON document, whatever stderr shows
    assert not [line for line in said(ran) if os.sep in line]
    assert state() == before


def test_looking_for_patterns_is_one_stage(fxshare: Run) -> None:
    ran = fxshare("init", "cli_toy:make")
    assert ran.code == 0, ran.err
    started = [line.partition(":")[0] for line in said(ran) if line.endswith(": started")]
    assert sorted(started) == ["capture", "load", "propose"]


def test_verbose_shows_passes_with_their_rewrites(fxshare: Run) -> None:
    ran = fxshare(*COMPILE, "-v")
    assert ran.code == 0, ran.err
    assert re.search(r"^pass share-basis: 8 rewrites in \d+\.\d+ s$", ran.err, re.MULTILINE)
    assert "pass " not in ran.out
    assert not [line for line in said(ran) if os.sep in line]


def test_the_trials_of_a_search(fxshare: Run) -> None:
    budget = ("--set", "group_size=null", "--set", "compression_rate=null", "--keep", "0.8")
    ran = fxshare("plan", *COMPILE[1:], *budget)
    assert ran.code == 0, ran.err
    lines = said(ran)
    found = [at for at, line in enumerate(lines) if line.startswith("plan: trial 1 of ")]
    assert found
    assert lines.index("plan: started") < lines.index("plan: searching: started") < found[0]
    assert re.search(
        r"predicted loss [+-][\d.e-]+, measured [+-][\d.e-]+ on \d+ tokens, in \d", lines[found[0]]
    )
    assert re.fullmatch(r"plan: done in .* s \(planned mode, \d+ groups\)", lines[-1])


@pytest.mark.parametrize(("options", "shown"), [((), False), (("-v",), True), (("-q",), False)])
def test_a_terminal_shows_them_where_asked(
    options: tuple[str, ...], shown: bool, fxshare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", "--capture", "modules", *options)
    assert ran.code == 0, ran.err
    assert ("capture: started" in ran.err) == shown


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("of nobody"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_error_leaves_no_done_and_no_handler(
    error: BaseException, code: int, fxshare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise error

    before = state()
    monkeypatch.setattr("fxshare.capture.front_ends.structure_copy", fail)
    ran = fxshare(*COMPILE)
    assert (ran.code, ran.out) == (code, "")
    assert "capture: started\ncapture: stopped after 0.0 s\nerror: " in ran.err
    assert "capture: done" not in ran.err
    assert state() == before


def test_both_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "planner", "-v", "-q"]) == 2
    expected = "error: --verbose and --quiet: expected one of the two, found both; leave one out\n"
    assert capsys.readouterr() == ("", expected)
