"""Stages as lines of ``logging``: what is said, by whom, and what is not when one fails."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxshare
from fxshare.base.progress import stage

LOG = logging.getLogger("fxshare.test")
SHARING = {
    "weight_types": {"linear": {"pattern": r"\d+$"}},
    "block_pattern": r"(\d+)",
    "group_size": 2,
    "compression_rate": 0.5,
}


def layers() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))


def test_a_stage_says_when_it_starts_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fxshare")
    with stage("outer", LOG) as running:
        running.found("front end fx")
        with stage("inner", LOG):
            pass
    outer, inner, done, end = caplog.messages
    assert (outer, inner) == ("outer: started", "inner: started")
    assert re.fullmatch(r"inner: done in \d+\.\d s", done)
    assert re.fullmatch(r"outer: done in \d+\.\d s \(front end fx\)", end)
    assert {r.name for r in caplog.records} == {"fxshare.test"}
    assert {r.levelno for r in caplog.records} == {logging.INFO}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_stage_that_fails_is_never_done(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fxshare")
    with pytest.raises(type(error)), stage("work", LOG):
        raise error
    assert len(caplog.messages) == 2
    assert re.fullmatch(r"work: stopped after \d+\.\d s", caplog.messages[1])


def test_the_stages_of_a_compilation(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG, "fxshare")
    caplog.set_level(logging.DEBUG, "passes")
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))]
    gm = fxshare.compile(layers(), SHARING, calibration=batches)
    fxshare.save(gm, tmp_path / "out")
    fxshare.load(tmp_path / "out", layers)
    said = [r for r in caplog.records if r.name.startswith("fxshare")]
    ends = [r.getMessage() for r in said if re.search(r": (started|done)", r.getMessage())]
    names = "match capture plan calibrate factorise rewrite verify save"
    expected = [f"{name}: {end}" for name in names.split() for end in ("started", "done")]
    loading = ["load: started", "rewrite: started", "rewrite: done", "load: done"]
    assert [m.split(" in ")[0] for m in ends] == [*expected, *loading]
    by = {m.getMessage().partition(":")[0]: m.name for m in said}
    assert by["capture"] == "fxshare.capture.front_ends"
    assert by["save"] == "fxshare.store.save"
    assert "capture: done" in caplog.text
    assert "(front end fx)" in caplog.text
    passes = [r for r in caplog.records if r.name == "passes.runner"]
    assert "pass share-basis: 2 rewrites in" in "\n".join(r.getMessage() for r in passes)
    assert {r.levelno for r in passes} == {logging.DEBUG}
    assert not [m for m in caplog.messages if os.sep in m]


def test_nothing_is_shown_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    before = [(log.level, list(log.handlers)) for log in map(logging.getLogger, ("fxshare", ""))]
    fxshare.compile(layers(), SHARING)
    assert capsys.readouterr() == ("", "")
    after = [(log.level, list(log.handlers)) for log in map(logging.getLogger, ("fxshare", ""))]
    assert after == before
