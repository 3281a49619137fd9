"""Several processes that share a compilation: what they come to, and how they end.

The checks are in ``ranks.py``, which each rank runs: an import of torch for every process and no
more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planning.ending import summed
from tests.planning.models import groups_of
from tests.planning.ranks import CHECKS, WHOLE, compiled

ROOT = Path(__file__).parents[2]
OF_THREE = (
    "statistics",
    "plan_and_weights",
    "given_statistics_equal_bits",
    "work_folder_of_one_process",
    "an_error_of_all",
    "a_rank_that_raises",
    "a_rank_that_is_killed",
)


# what takes least; all checks, and three ranks, are slow tests
FEW = (
    "few_statistics",
    "plan_and_weights",
    "given_statistics_equal_bits",
    "a_rank_that_raises",
    "a_rank_that_is_killed",
)


def run(size: int, folder: Path, names: tuple[str, ...]) -> list[dict[str, tuple[str, float]]]:
    """What became of the checks, by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(size):
        command = [sys.executable, "-m", "tests.planning.ranks", str(rank), str(size), str(folder)]
        with (folder / f"said-{rank}").open("w") as said:
            process = subprocess.Popen(
                [*command, *names],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        started.append(process)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):  # what the others found says why
            for process in started:
                process.wait(timeout=300)
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = []
    for rank in range(size):
        results = folder / f"rank-{rank}.json"
        said = (folder / f"said-{rank}").read_text()[-2000:]
        found.append(json.loads(results.read_text()) if results.exists() else {"start": (said, 0)})
    return found


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, FEW),
        pytest.param(2, tuple(CHECKS), marks=pytest.mark.slow),
        pytest.param(3, OF_THREE, marks=pytest.mark.slow),
    ],
    ids=["2", "2, all", "3"],
)
def test_ranks(size: int, names: tuple[str, ...], tmp_path: Path) -> None:
    found = run(size, tmp_path, names)
    failed = {
        f"rank {rank}: {name}": text
        for rank, results in enumerate(found)
        for name, (text, _) in results.items()
        if text
    }
    assert not failed, "\n".join(f"{name}\n{text}" for name, text in failed.items())
    assert set(found[0]) == set(names)
    # the last one was killed in the last of them
    assert set(found[-1]) == set(names) - {"a_rank_that_is_killed"}
    # it had calibrated, and was judging plans: one process goes on from there
    assert list((tmp_path / "killed" / "statistics").glob("part-*"))
    continued = compiled(loss=summed, work=tmp_path / "killed", cfg=WHOLE)
    undisturbed = compiled(loss=summed, cfg=WHOLE)
    assert groups_of(continued.fxshare.plan) == groups_of(undisturbed.fxshare.plan)
