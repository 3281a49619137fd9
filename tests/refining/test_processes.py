"""Several processes that refine together: the result of one process, to rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxshare.base.numerics import tolerance, worst
from tests.refining.build import everything, features, refined, subject
from tests.refining.ranks import BLOCKS, OPTIONS


def run(made: Path, *checks: str) -> Path:
    """What two ranks leave that go through checks."""
    command = [sys.executable, "-m", "tests.refining.ranks"]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(made), *checks]) for rank in range(2)
    ]
    try:
        assert [one.wait(timeout=300) for one in started] == [0, 0]
    finally:
        for one in started:
            one.kill()
    for rank in range(2):
        failed = (made / f"rank-{rank}.txt").read_text(encoding="utf-8")
        assert not failed, f"rank {rank}: {failed}"
    return made


def same_bits(folder: Path, name: str) -> Any:
    """What the ranks have: tensors, tokens and record alike."""
    first, other = (
        torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert all(torch.equal(first[0][n], other[0][n]) for n in first[0])
    assert first[1:] == other[1:]
    return first


def compare(gm: Any, alone: Any, found: Any, dtype: torch.dtype = torch.float32) -> None:
    """Equal to one process, but for rounding: of a gradient that is next to nothing a step of Adam
    takes the sign, so what was moved is equal to a few thousandths. With a rank left out it is
    not."""
    tensors, _, tokens = found
    assert tokens == alone.fxshare.refined[-1].tokens
    before, expected = everything(gm), everything(alone)
    moved = [n for n in before if not torch.equal(before[n], expected[n])]
    assert moved
    for n in expected:
        if n not in moved:
            assert torch.equal(expected[n], tensors[n])
            continue
        gap = worst(expected[n] - before[n], tensors[n] - before[n])
        assert gap.relative <= 100 * tolerance(dtype, 12 * 21), n


def test_two_processes_are_one_to_rounding(tmp_path: Path) -> None:
    made = run(tmp_path, "equal", "refusals")
    model, gm = subject("branches", "shared")
    alone = refined(gm, model, features(), second=features(1, seed=8), **OPTIONS)
    compare(gm, alone, same_bits(made, "equal"))


@pytest.mark.slow
def test_block_by_block_two_processes_are_one_to_rounding(tmp_path: Path) -> None:
    made = run(tmp_path, "blocks")
    model, gm = subject(dtype=torch.float64)
    alone = refined(gm, model, **BLOCKS)
    assert alone.fxshare.refined[-1].kept
    compare(gm, alone, same_bits(made, "blocks"), torch.float64)


@pytest.mark.slow
def test_time_bad_batches_and_ranks_that_fail(tmp_path: Path) -> None:
    made = run(tmp_path, "dropped", "by_time", "resumed")
    same_bits(made, "by_time")
    model, gm = subject("branches", "shared")
    data = features(6)
    data[2][0, 0, 0] = float("nan")
    alone = refined(gm, model, data, heldout=features(2, seed=5), **OPTIONS)
    compare(gm, alone, same_bits(made, "dropped"))
    model, gm = subject()
    compare(gm, refined(gm, model, **OPTIONS), same_bits(made, "resumed"))


@pytest.mark.slow
def test_parts_are_put_together_whatever_happens(tmp_path: Path) -> None:
    made = run(tmp_path, "sharded", "sharded_further")
    model, gm = subject("branches", "shared")
    data = features(6)
    data[2][0, 0, 0] = float("nan")
    alone = refined(gm, model, data, heldout=features(3, seed=5), **OPTIONS)
    compare(gm, alone, same_bits(made, "some-dropped"))
    model, gm = subject(dtype=torch.float64)
    alone = refined(gm, model, **OPTIONS)
    for name in ("sharded", "recomputed", "gone-on"):
        compare(gm, alone, same_bits(made, name), torch.float64)
