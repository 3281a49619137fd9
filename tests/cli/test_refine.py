"""``fxshare refine``: a saved folder in, a nearer one out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fxshare as library
from fxshare.cli.refine import Windows
from fxshare.refining.steps import Stepper
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
USUAL = ("--teacher", "cli_toy:make", "--data", "ids.npy", "--length", 20, "--learning-rate", 3e-3)


def refine(fxshare: Run, saved: Path, *more: object) -> Ran:
    return fxshare("refine", saved, *USUAL, *more)


def test_it_saves_what_verifies(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "better"
    done = refine(fxshare, saved, "--steps", 8, "-o", out, "--second", "ids.npy")
    assert done.code == 0, done.err
    assert "refined by kl: 8 steps" in done.out
    assert f"saved to {out}" in done.out
    assert "refine: step 8" in done.err  # in a pipe: a line for each measurement
    assert fxshare("verify", "cli_toy:make", out).code == 0
    shown = fxshare("inspect", out, "--original", "cli_toy:make")
    assert "refined by kl: 8 steps" in shown.out
    again = fxshare(
        "refine", out, *USUAL, "--steps", 4, "-o", tmp_path / "c", "--json", "--objective", "ce",
        "--also", "norms, biases", "--quiet",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert "refine: step" not in again.err
    found = json.loads(again.out)
    assert (found["objective"], found["trained"]) == ("ce", ["factors", "norms", "biases"])
    assert found["after"]["objective"] <= found["before"]["objective"]
    assert found["saved_to"] == str(tmp_path / "c")


def test_it_goes_on_from_checkpoints(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    whole = refine(fxshare, saved, "--steps", 8, "-o", tmp_path / "whole", "--json")
    plain = Stepper.__call__

    def call(self: Any, optimiser: Any, step: int, rate: float) -> Any:
        if step == 6:
            raise RuntimeError("out of power")
        return plain(self, optimiser, step, rate)

    options = ("--steps", 8, "-o", tmp_path / "out", "--resume", "--json")
    with mock.patch.object(Stepper, "__call__", call):
        ended = refine(fxshare, saved, *options)
    assert ended.code == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "checkpoint").exists()
    resumed = refine(fxshare, saved, *options)
    assert resumed.code == 0, resumed.err
    left, right = (json.loads(run.out) for run in (whole, resumed))
    assert [p["loss"] for p in left["curve"]] == [p["loss"] for p in right["curve"]]
    other = ("--work", tmp_path / "out.work", "--steps", 9, "-o", tmp_path / "more")
    refused = refine(fxshare, saved, *other)
    assert refused.code == 1
    assert "was made with other options" in refused.err


def test_ctrl_c_saves_the_best_so_far(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    plain = Stepper.__call__

    def call(self: Any, optimiser: Any, step: int, rate: float) -> Any:
        if step == 9:
            raise KeyboardInterrupt
        return plain(self, optimiser, step, rate)

    with mock.patch.object(Stepper, "__call__", call):
        done = refine(fxshare, saved, "--steps", 40, "-o", tmp_path / "out")
    assert done.code == 130
    assert "interrupted at step 9; refined by kl" in done.out
    gm = library.load(tmp_path / "out", "cli_toy:make")
    assert gm.fxshare.refined[-1].stopped == "interrupted"
    assert fxshare("verify", "cli_toy:make", tmp_path / "out").code == 0


def test_a_picture_of_the_loss(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.svg"
    done = refine(fxshare, saved, "--steps", 8, "-o", tmp_path / "out", "--draw", picture)
    assert done.code == 0, done.err
    assert picture.read_text().lstrip().startswith("<?xml")
    refused = refine(fxshare, saved, "--steps", 8, "-o", tmp_path / "b", "--draw", "curve.gif")
    assert refused.code == 2
    assert "expected a picture ending in .svg, .png or .pdf" in refused.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ((), 2, "expected --minutes M or --steps N, found neither"),
        (("--minutes", 0), 2, "minutes: expected a number above 0"),
        (("--steps", 2, "--also", "heads"), 2, "also: expected some of norms, biases"),
        (("--steps", 2, "--data-weight", 2), 2, "data_weight: expected 0 to 1"),
        (("--steps", 2, "--length", 500), 1, "expected at least 500 tokens"),
        (("--steps", 2, "--data", "large.npy"), 1, "expected token ids of 0 to 39"),
        (("--steps", 2, "--teacher", "cli_toy:wide"), 1, ""),
        (("--steps", 2, "--work", "sharing.yaml"), 1, "expected a folder, found a file"),
        (("--steps", 2, "--objective", "hidden", "--temperature", 2), 1, "belong to objective"),
    ],
)
def test_what_is_refused(
    options: tuple[object, ...], code: int, reason: str, fxshare: Run, saved: Path, tmp_path: Path
) -> None:
    found = refine(fxshare, saved, "-o", tmp_path / "out", *options)
    assert (found.code, found.out) == (code, "")
    assert reason in " ".join(found.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_there_is_refused(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    found = refine(fxshare, saved, "--steps", 2, "-o", out)
    assert found.code == 1
    assert "exists; choose another folder, or replace it with --force" in found.err
    found = refine(fxshare, saved, "--steps", 2, "-o", out, "--force")
    assert "was not written by fxshare" in found.err
    assert (out / "thesis.txt").read_text() == "x"
    found = fxshare("refine", "cli_toy:make", *USUAL, "--steps", 2, "-o", tmp_path / "b")
    assert found.code == 2
    assert "expected a folder that 'fxshare compile -o'" in found.err
    # its own folder, replaced by what came of it
    assert refine(fxshare, saved, "--steps", 2, "-o", tmp_path / "own").code == 0
    own = tmp_path / "own"
    replaced = fxshare("refine", own, *USUAL, "--steps", 2, "-o", own, "--force", "--json")
    assert replaced.code == 0, replaced.err
    assert len(library.load(own, "cli_toy:make").fxshare.refined) == 2


def test_what_could_not_be_saved_is_refused_before_training(
    fxshare: Run, saved: Path, tmp_path: Path
) -> None:
    never = mock.patch.object(library, "refine", side_effect=AssertionError("it was trained"))
    full = mock.patch(
        "fxshare.base.files.tempfile.TemporaryFile",
        side_effect=OSError(30, "Read-only file system"),
    )
    with never, full:
        found = refine(fxshare, saved, "--steps", 2, "-o", tmp_path / "deep" / "out")
    assert (found.code, found.out) == (1, "")
    assert "cannot write" in found.err
    assert "Read-only file system" in found.err
    for work in (tmp_path / "out", tmp_path / "out" / "w"):
        with never:
            found = refine(fxshare, saved, "--steps", 2, "-o", tmp_path / "out", "--work", work)
        assert found.code == 2
        assert "expected a folder outside of -o" in found.err
    assert list(tmp_path.iterdir()) == []


class Masked(torch.nn.Module):
    """A model that padded texts can be given to."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids * attention_mask


def test_padded_texts_are_divided_and_pieces_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    rows = torch.arange(10)[:, None] * 30 + torch.arange(30)
    np.save(path, rows.numpy())
    loaded: Any = SimpleNamespace(model=Masked(), tokenizer=None)

    def texts(batches: Any) -> list[Any]:
        return [
            ids[mask.bool()].tolist()
            for b in batches
            for ids, mask in zip(*b.values(), strict=True)
        ]

    windows = Windows(padded=True, length=8, batch_size=4)
    fit, apart = (texts(found) for found in windows.parted(str(path), None, loaded))
    assert len(apart) == 1
    text = apart[0][0] // 30
    assert apart[0] == rows[text, :8].tolist()
    # pieces from any place of the other texts, as many tokens as they have
    assert len(fit) >= 9 + 9 * 30 // 8
    assert any(one[0] % 30 for one in fit)
    assert all(one == list(range(one[0], one[0] + 8)) and one[0] // 30 != text for one in fit)
    given, apart = (texts(found) for found in windows.parted(str(path), str(path), loaded))
    assert given == apart == rows[:, :8].tolist()
    plain = Windows(length=8, batch_size=4)
    assert plain.parted(str(path), None, loaded)[1] is None
