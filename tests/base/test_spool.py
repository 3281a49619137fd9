"""Batches that are given once and gone through again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxshare.base.spool import Picked, Spooled


def given() -> Iterator[Any]:
    for number in range(6):
        ids = torch.full((2, 50), number)
        yield [ids, {"input_ids": ids, "use_cache": False}, (ids, [ids, None])][number % 3]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("in_memory", [0, 2000, 1 << 26])
def test_the_same_again_wherever_it_is(in_memory: int) -> None:
    found = Spooled(given(), in_memory=in_memory)
    assert len(found) == 6
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(found, given(), strict=True))
    picked = Picked(found, [4, 1])
    expected = list(given())
    assert same(picked[0], expected[4])
    assert same(picked[1:][0], expected[1])
    assert same(found[5:][0], expected[5])


def test_files_go_with_it() -> None:
    found = Spooled(given(), in_memory=2000)
    folder = found._folder
    assert folder is not None
    assert [one.suffix for one in folder.iterdir()] == [".pt"] * 4
    del found
    assert not folder.exists()


def test_what_torch_would_not_read_back_stays_in_memory() -> None:
    class Batch:
        ids = torch.ones(1000)

    odd = [Batch(), {"a": Batch()}, UserDict(ids=torch.ones(1000))]
    found = Spooled(odd, in_memory=0)
    assert found[0] is odd[0]
    assert found[1] is odd[1]
    assert torch.equal(found[2]["ids"], odd[2]["ids"])  # type: ignore[index]


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from fxshare.base.unfinished import temporary_folder\n"
        "class Owner: pass\n"
        "owner = Owner(); folder = temporary_folder(owner); (folder / 'sums').write_bytes(b'x')\n"
        "other = Owner(); temporary_folder(other); del other\n"
        "os.kill(os.getpid(), signal.SIGKILL) if 'kill' in sys.argv else None\n"
        "print([one.name for one in folder.parent.iterdir()] == [folder.name])\n"
    )

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("kill").returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "sums").exists()
    # removed, and its own beside it was the only one while it ran
    assert run().stdout == "True\n"
    assert list(tmp_path.iterdir()) == []
