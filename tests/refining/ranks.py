"""One rank of several that refine; see ``test_processes.py``, which starts them.

::

    python -m tests.refining.ranks RANK SIZE FOLDER [CHECK ...]
"""

from __future__ import annotations

import datetime as dt
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fxshare.base import processes
from fxshare.errors import FxShareError, ProcessError, RefineError
from fxshare.refining.steps import Stepper
from fxshare.refining.student import Student
from tests.refining.build import everything, features, refined, subject

CHECKS: dict[str, Callable[[int, int, Path], None]] = {}
OPTIONS: Any = {"steps": 12, "accumulate": 2}
BLOCKS: Any = {"steps": 3, "accumulate": 2, "objective": "blocks"}


def check(function: Callable[[int, int, Path], None]) -> Callable[[int, int, Path], None]:
    CHECKS[function.__name__] = function
    return function


def kept(result: Any, folder: Path, name: str, rank: int) -> None:
    """For the process that started this one: the tensors, and what was done."""
    done = result.fxshare.refined[-1]
    torch.save((everything(result), str(done), done.tokens), folder / f"{name}-{rank}.pt")


@check
def equal(rank: int, size: int, folder: Path) -> None:
    model, gm = subject("branches", "shared")
    before = everything(gm)
    result = refined(gm, model, features(), second=features(1, seed=8), **OPTIONS)
    kept(result, folder, "equal", rank)
    assert all(torch.equal(t, before[n]) for n, t in everything(gm).items())


@check
def blocks(rank: int, size: int, folder: Path) -> None:
    """Each block is trained by all, on what one of them has passed on."""
    model, gm = subject(dtype=torch.float64)
    kept(refined(gm, model, **BLOCKS), folder, "blocks", rank)


@check
def sharded(rank: int, size: int, folder: Path) -> None:
    """Each has a part of what is trained; what comes of it is the same, on all ranks."""
    model, gm = subject(dtype=torch.float64)
    held: list[tuple[int, int]] = []
    plain = Student.shard

    def shard(student: Student) -> None:
        before = sum(t.numel() for t in student.masters.values())
        plain(student)
        held.append((before, sum(t.numel() for t in student.masters.values())))

    with mock.patch.object(Student, "shard", shard):
        kept(refined(gm, model, shard=True, **OPTIONS), folder, "sharded", rank)
    ((whole, part),) = held
    assert part < 0.55 * whole


@check
def by_time(rank: int, size: int, folder: Path) -> None:
    """Every rank takes as many steps as the first, with a rate that is chosen by trying."""
    model, gm = subject()
    options = {**OPTIONS, "steps": None, "minutes": 0.02, "learning_rate": None}
    kept(refined(gm, model, **options), folder, "by_time", rank)


@check
def dropped(rank: int, size: int, folder: Path) -> None:
    """A batch that is not finite is dropped by all, whoever has it."""
    model, gm = subject("branches", "shared")
    data = features(6)
    data[2][0, 0, 0] = float("nan")
    result = refined(gm, model, data, heldout=features(2, seed=5), **OPTIONS)
    assert result.fxshare.refined[-1].dropped > 0
    kept(result, folder, "dropped", rank)


@check
def resumed(rank: int, size: int, folder: Path) -> None:
    """The first rank writes; a rank that fails ends both, and both go on from the checkpoint."""
    model, gm = subject()
    plain = Stepper.__call__

    def call(self: Any, optimiser: Any, number: int, rate: float) -> Any:
        if number == 9 and rank == size - 1:
            raise RuntimeError("the power is gone")
        return plain(self, optimiser, number, rate)

    work = folder / "work"
    with mock.patch.object(Stepper, "__call__", call):
        ends(
            "the power is gone",
            lambda: refined(gm, model, work=work, **OPTIONS),
            RuntimeError if rank == size - 1 else ProcessError,
        )
    assert (work / "checkpoint").exists()
    kept(refined(gm, model, work=work, **OPTIONS), folder, "resumed", rank)


@check
def sharded_further(rank: int, size: int, folder: Path) -> None:
    """Layers computed again, bfloat16, a batch that is dropped, norms; a rank that fails in the
    middle of a pass, and going on from a checkpoint that one of them wrote, sharded or not."""
    model, gm = subject(dtype=torch.float64)
    options = {**OPTIONS, "shard": True}
    kept(refined(gm, model, recompute=True, **options), folder, "recomputed", rank)
    work = folder / "work of parts"
    plain = Stepper._gradient

    def gradient(self: Any, number: int) -> Any:
        passed.append(0)
        if rank == size - 1 and len(passed) == 9:
            with self.student._passing():
                raise RuntimeError("the power is gone")
        return plain(self, number)

    passed: list[int] = []
    short = mock.patch.object(processes, "_PASSING", dt.timedelta(seconds=4))
    with mock.patch.object(Stepper, "_gradient", gradient), short:
        ends(
            "the power is gone",
            lambda: refined(gm, model, work=work, **options),
            RuntimeError if rank == size - 1 else ProcessError,
        )
    assert (work / "checkpoint").exists()
    dist.barrier()
    kept(refined(gm, model, work=work, **options), folder, "gone-on", rank)
    model, gm = subject("branches", "shared")
    data = features(6)
    data[2][0, 0, 0] = float("nan")
    result = refined(gm, model, data, heldout=features(3, seed=5), **options)
    assert result.fxshare.refined[-1].dropped > 0
    kept(result, folder, "some-dropped", rank)
    model, gm = subject(dtype=torch.bfloat16)
    done = refined(gm, model, also=("norms",), **options).fxshare.refined[-1]
    assert done.after.objective < done.before.objective


@check
def refusals(rank: int, size: int, folder: Path) -> None:
    model, gm = subject("branches", "shared")
    data = features()
    ends("accumulate=1: expected at least 2", lambda: refined(gm, model, data), RefineError)
    parts = {**OPTIONS, "accumulate": 3, "shard": True}
    ends("expected a multiple of 2", lambda: refined(gm, model, data, **parts), RefineError)
    by_modules = subject(capture="modules")[::-1]
    parts = {**OPTIONS, "shard": True}
    ends("at module granularity", lambda: refined(*by_modules, **parts), RefineError)
    ends("has another", lambda: refined(gm, model, data, seed=rank, **OPTIONS), ProcessError)


def ends(part: str, call: Callable[[], Any], kind: type[Exception] = FxShareError) -> None:
    with pytest.raises(kind, match=part):
        call()


def main(rank: int, size: int, folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    failed = ""
    for name in names or CHECKS:
        try:
            CHECKS[name](rank, size, folder)
        except Exception:
            failed += f"{name}: {traceback.format_exc()}\n"
            break
    (folder / f"rank-{rank}.txt").write_text(failed, encoding="utf-8")
    os._exit(0)  # the group may have lost a rank, which its end would wait for


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
