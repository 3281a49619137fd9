"""``plan`` and ``compile`` without -c: what ``init`` finds, said so, and changed by options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]

DATA = ("--calibration", "ids.npy", "--length", "20")
RATE = ("--set", "group_size=2", "--set", "compression_rate=0.5")


@pytest.fixture
def written(fxshare: Run, tmp_path: Path) -> Path:
    """The configuration that ``init`` writes for the toy."""
    path = tmp_path / "cfg.yaml"
    assert fxshare("init", "cli_toy:make", "-o", path).code == 0
    return path


def decided(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without the seconds that making it took."""
    outlook = {k: v for k, v in (plan["outlook"] or {}).items() if "seconds" not in k}
    trials = [{k: v for k, v in t.items() if "seconds" not in k} for t in outlook.get("trials", ())]
    return {**plan, "outlook": {**outlook, "trials": trials}}


@pytest.mark.parametrize("options", [(), RATE, ("--keep", "0.7", *DATA)])
def test_a_plan_is_that_of_the_written_file(
    fxshare: Run, written: Path, options: tuple[str, ...]
) -> None:
    ran = fxshare("plan", "cli_toy:make", *options, "--json")
    assert ran.code == 0
    same = fxshare("plan", "cli_toy:make", "-c", written, *options, "--json")
    assert decided(ran.json) == decided(same.json)
    assert ran.err.count("no -c: the configuration that 'fxshare init' finds in the model") == 1
    assert "2 weight types (fc, proj)" in ran.err
    assert "'fxshare init cli_toy:make -o cfg.yaml' writes it down" in ran.err
    assert ("--keep 0.8 makes it smaller" in ran.err) == (options == ())
    assert "no -c" not in same.err


def test_compiling_saves_what_was_found(fxshare: Run, written: Path, tmp_path: Path) -> None:
    ran = fxshare("compile", "cli_toy:make", *RATE, *DATA, "-o", tmp_path / "out")
    assert ran.code == 0
    assert "no -c" in ran.err
    assert "no -c" not in ran.out
    assert ran.err.count("capture: started") == 1  # what was looked at is what is compiled
    same = fxshare("compile", "cli_toy:make", "-c", written, *RATE, *DATA, "-o", tmp_path / "same")
    assert same.code == 0
    for name in ("config.yaml", "plan.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "same" / name).read_text()


def test_a_plan_made_without_a_configuration_is_realised_without_one(
    fxshare: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    assert fxshare("plan", "cli_toy:make", *RATE, "-o", path).code == 0
    ran = fxshare("compile", "cli_toy:make", *RATE, "--plan", path, "--json")
    assert ran.code == 0
    groups = json.loads(path.read_text())["groups"]
    assert [g["rank"] for g in ran.json["groups"]] == [g["rank"] for g in groups]


@pytest.mark.parametrize("command", ["plan", "compile"])
def test_what_cannot_be(fxshare: Run, saved: Path, command: str) -> None:
    ran = fxshare(command, "cli_toy:make", "--set", "compresion_rate=0.5")
    assert (ran.code, ran.out) == (2, "")
    assert "Did you mean 'compression_rate'?" in ran.err
    ran = fxshare(command, saved, "--original", "cli_toy:make")
    assert ran.code == 2  # no such option here
    ran = fxshare(command, "cli_toy:nothing_to_find")
    assert ran.code != 0
    assert "Traceback" not in ran.err


def test_a_compiled_folder_has_nothing_to_propose(fxshare: Run, gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fxshare("compile", gpt2, *RATE, "-o", out).code == 0
    ran = fxshare("plan", out)
    assert (ran.code, ran.out) == (2, "")
    assert "expected an original model, found one that fxshare compiled" in ran.err


def test_a_sweep_needs_a_budget_also_of_a_found_configuration(fxshare: Run) -> None:
    ran = fxshare("plan", "cli_toy:make", "--sweep", "-", *DATA)
    assert (ran.code, ran.out) == (2, "")
    assert "the exact mode has none; give one, such as --keep 0.8" in ran.err


def test_embeddings_are_taken_where_they_are_asked_for(fxshare: Run) -> None:
    budget = ("--bits", "16,8", "--bytes-kept", "0.4", "--set", "planner.search=off")
    command = ("plan", "cli_toy:make", *DATA, *budget, "--json")
    apart, together = fxshare(*command), fxshare(*command, "--embeddings")
    assert together.code == 0, together.err
    names = [
        {site["name"]: site["lookups"] for site in ran.json["sites"]} for ran in (apart, together)
    ]
    assert set(names[1]) - set(names[0]) == {"embed", "head"}
    assert names[1]["embed"] == ["embed"]
    rounded = [name for one in together.json["rounded"] for name in one["slices"]]
    assert {"embed", "head"} & set(rounded)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("plan", "cli_toy:make", "-c", "sharing.yaml"), "sharing.yaml says what is matched"),
        (("estimate", "cli_toy:wide"), "has no embedding and no head"),
        (("plan", "--work", "nowhere"), "nowhere has the weights of the run that wrote it"),
    ],
)
def test_embeddings_that_nothing_offers_are_refused(
    fxshare: Run, given: tuple[str, ...], reason: str
) -> None:
    ran = fxshare(*given, "--embeddings")
    assert ran.code == 2
    assert reason in ran.err
