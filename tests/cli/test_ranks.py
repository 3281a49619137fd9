"""The command line in several processes, as torchrun starts them: one speaks, all end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = ("compile", "cli_toy:make", "-c", "sharing.yaml", "--calibration", "ids.npy")
OPTIONS = ("--length", "20", "--batch-size", "2")
KILLED = """
import os, signal
import cli_toy


class Killed(cli_toy.Toy):
    def forward(self, ids):
        if os.environ.get("RANK") == os.environ["KILLED"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(ids)


def make():
    return Killed()


def raises():
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no such file here")
    return cli_toy.make()
"""


def ranks(folder: Path, *arguments: str, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """What each rank has written; started with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fxshare", *arguments],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [
            subprocess.CompletedProcess(one.args, one.returncode, *said)
            for one, said in [(one, one.communicate(timeout=120)) for one in started]
        ]
    finally:
        for one in started:
            one.kill()


def test_one_writes_and_speaks(folder: Path) -> None:
    first, other = ranks(folder, *COMMAND, *OPTIONS, "--json", "-o", "of-two")
    assert first.returncode == other.returncode == 0, first.stderr + other.stderr
    report = json.loads(first.stdout)
    assert report["saved_to"] == "of-two"
    assert (folder / "of-two" / "model.safetensors").exists()
    assert "calibrate: done" in first.stderr
    assert (other.stdout, other.stderr) == ("", "")


def test_a_wrong_command_is_told_once(folder: Path) -> None:
    for arguments, part in (
        (("inspect", "cli_toy:make"), "fxshare inspect is the work of one process"),
        (("compile", "--no-such-option"), "No such option"),
    ):
        first, other = ranks(folder, *arguments)
        assert first.returncode == other.returncode == 2
        assert part in first.stderr
        assert (other.stdout, other.stderr) == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "killed", "told"),
    [
        ("make", 1, "error: rank 1 (process "),
        ("make", 0, "error: rank 0 (process "),
        ("raises", 1, "error: rank 1: "),
    ],
)
def test_a_rank_that_fails_ends_all(
    folder: Path, factory: str, killed: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "cli_killed.py").write_text(KILLED, encoding="utf-8")
    monkeypatch.setenv("KILLED", str(killed))
    command = ("compile", f"cli_killed:{factory}", *COMMAND[2:], *OPTIONS)
    start = time.monotonic()
    both = ranks(folder, *command, "--quiet", "-o", "never")
    assert time.monotonic() - start < 60
    speaking = both[1 if killed == 0 else 0]
    assert (speaking.returncode, speaking.stdout) == (1, "")
    assert speaking.stderr.splitlines()[-1].startswith(told)
    assert all(one.returncode != 0 for one in both)
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_torchrun(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    cfg = "weight_types: {fc: {pattern: '.*fc$'}, proj: {pattern: '.*proj$'}}\n"
    (folder / "types.yaml").write_text(cfg + "block_pattern: 'blocks\\.(\\d+)'\n")
    arguments = ["compile", "cli_toy:make", "-c", "types.yaml", *COMMAND[4:], *OPTIONS]
    budget = ("--keep", "0.8", "--work", "work-of-two")
    ran = subprocess.run(
        [*command, "fxshare", *arguments, *budget, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["mode"] == "planned"
    assert (folder / "work-of-two" / "work.json").exists()
