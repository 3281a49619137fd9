"""Plans under a budget from the command line: table, picture, sweep, file, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]

TYPES = """
weight_types:
    fc: {pattern: '.*\\.fc$'}
    proj: {pattern: '.*\\.proj$'}
block_pattern: 'blocks\\.(\\d+)'
"""
QUICK = "planner: {strategy: layers, search: off, keep_dense: [1]}\n"
DATA = ("--calibration", "ids.npy", "--length", "20")


@pytest.fixture(scope="module")
def budget(folder: Path) -> Path:
    """A configuration with weight types, and a planner without a search; no budget."""
    path = folder / "budget.yaml"
    path.write_text(TYPES + QUICK, encoding="utf-8")
    return path


@pytest.fixture
def command(budget: Path) -> tuple[object, ...]:
    return ("cli_toy:make", "-c", budget, "--keep", "0.7", *DATA)


def test_the_table_of_a_planned_plan(fxshare: Run, command: tuple[object, ...]) -> None:
    ran = fxshare("plan", *command)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("planned mode: 8 sites, 8 slices, ")
    assert "bytes: 9,216 → " in lines[2]
    assert "predicted Δloss" in lines[3]
    reason = "dense: 2 slices (blocks.1.fc, blocks.1.proj), 576 numbers: planner.keep_dense has"
    assert f"{reason} layer 1" in ran.out
    assert "dual bound" in ran.out
    assert "search: off, 1 plan, " in ran.out
    assert "planned" in lines[-1]


def test_a_search_measures_on_held_back_data(fxshare: Run, budget: Path, folder: Path) -> None:
    search = ("--set", "planner.search=quick", "--set", "planner.remeasure=0")
    ran = fxshare("plan", "cli_toy:make", "-c", budget, "--keep", 0.7, *search, *DATA)
    assert ran.code == 0, ran.err
    assert "measured" in ran.out
    assert "per token on 40 held-back tokens" in ran.out
    assert "floor 0.6" in ran.out


def test_dense_slices_say_what_they_would_have_lost(fxshare: Run, budget: Path) -> None:
    command = ("cli_toy:make", "-c", budget, "--set", "planner.keep_dense=[]", "--keep", "0.97")
    ran = fxshare("plan", *command, *DATA)
    assert "numbers: at the price of" in ran.out
    assert "would save" in ran.out
    assert "and lose" in ran.out


def test_a_budget_without_data_says_sizes_only(fxshare: Run, budget: Path) -> None:
    ran = fxshare("plan", "cli_toy:make", "-c", budget, "--keep", "0.7")
    assert ran.code == 0, ran.err
    assert "no calibration data: uniform ranks" in ran.out
    assert "predicted" not in ran.out
    assert "planner.keep_dense has layer 1" in ran.out
    ran = fxshare("plan", "cli_toy:make", "-c", budget, "--max-bytes", "20000")
    assert ran.code == 1
    assert "needs calibration data" in ran.err


def test_the_exact_and_the_sharing_mode(fxshare: Run) -> None:
    both = ("--set", "group_size=null", "--set", "compression_rate=null")
    exact = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml", *both).out
    assert "dense: 8 slices (blocks.0.fc, " in exact
    assert "the exact mode compresses nothing" in exact
    sharing = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml").out
    assert "dense:" not in sharing
    assert "predicted" not in sharing


@pytest.mark.parametrize(
    ("shortcut", "same"),
    [
        (("--keep", "0.6"), "budget.params_kept=0.6"),
        (("--max-loss", "0.01"), "budget.max_loss_increase=0.01"),
        (("--max-bytes", "39000"), "budget.max_bytes=39000"),
        (("--max-bytes", "39kB"), "budget.max_bytes=39000"),
        (("--bytes-kept", "0.6"), "budget.bytes_kept=0.6"),
        (("--keep", "0.6", "--bits", "8"), "budget.params_kept=0.6 planner.bits=[8]"),
        (
            ("--bytes-kept", "0.4", "--bits", "8, 16,4"),
            "budget.bytes_kept=0.4 planner.bits=[16,8,4]",
        ),
    ],
)
def test_shortcuts_are_overrides(
    fxshare: Run, budget: Path, shortcut: tuple[str, ...], same: str
) -> None:
    command = ("plan", "cli_toy:make", "-c", budget, *DATA, "--json")
    sets = [part for one in same.split() for part in ("--set", one)]
    short, long = fxshare(*command, *shortcut), fxshare(*command, *sets)
    assert short.code == 0, short.err
    found = [dict(ran.json, outlook=None) for ran in (short, long)]
    assert found[0] == found[1]
    assert found[0]["groups"] or found[0]["rounded"]
    assert ("bits" in str(found[0])) == ("--bits" in shortcut)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--bits", "16;8"), "--bits 16;8: expected one or more of 16, 8 and 4, with commas"),
        (("--bits", ""), "such as --bits 16,8,4"),
        (("--bits", "16,3"), "expected a list of one or more of 16, 8 and 4"),
        (("--bits", "16,8", "--keep", "0.5"), "compete under a budget in bytes"),
        (("--bits", "8"), "found without budget"),
        (("--bytes-kept", "25"), "25 % is 0.25"),
        (("--bytes-kept", "0.5", "--max-bytes", "9kB"), "expected one limit"),
        (("--max-bytes", "many"), "with a unit, such as 8GB or 512MiB"),
    ],
)
def test_wrong_bits_and_bytes_are_refused(
    fxshare: Run, budget: Path, given: tuple[str, ...], reason: str
) -> None:
    types = ("-c", budget) if "--bytes-kept" in given or "--keep" in given else ()
    ran = fxshare("plan", "cli_toy:make", *types, *given, *DATA)
    assert ran.code == 2
    assert reason in ran.err


def test_shortcuts_that_contradict(fxshare: Run, budget: Path) -> None:
    ran = fxshare("plan", "cli_toy:make", "-c", budget, "--keep", "0.6", "--max-bytes", "9")
    assert ran.code == 2
    assert "expected one limit" in ran.err
    ran = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml", "--keep", "0.6")
    assert ran.code == 2
    assert "found together with compression_rate" in ran.err


# pictures and sweeps --------------------------------------------------------------------------


def test_pictures(fxshare: Run, command: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan, curve, stored = tmp_path / "plan.svg", tmp_path / "curve.png", tmp_path / "plan.json"
    ran = fxshare("plan", *command, "--draw", plan, "--sweep", curve, "-o", stored)
    assert ran.code == 0, ran.err
    assert plan.read_text(encoding="utf-8").startswith("<?xml")
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert f"written to {curve}" in ran.out
    again = tmp_path / "again.svg"
    assert fxshare("inspect", stored, "--draw", again).code == 0
    assert again.is_file()


def test_a_sweep_in_numbers(fxshare: Run, command: tuple[object, ...]) -> None:
    text = fxshare("plan", *command, "--sweep", "-").out
    assert "other budgets, as shares of the dense cost" in text
    document = fxshare("plan", *command, "--sweep", "-", "--json").json
    assert document["plan"]["mode"] == "planned"
    planned, uniform = document["sweep"]["planned"], document["sweep"]["uniform"]
    budgets = [point["budget"] for point in planned]
    assert budgets == sorted(budgets)
    assert budgets[-1] == 1.0
    losses = [point["loss"] for point in planned]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    for point in planned:
        assert point["kept"] <= point["budget"]
        assert point["bound"] <= point["loss"] + 1e-12
    # more freedom: at equal budgets a plan never loses more than uniform shares that fit in it
    for mine, other in zip(planned, uniform, strict=True):
        if other["kept"] <= mine["kept"]:
            assert mine["loss"] <= other["loss"] * (1 + 1e-9)
    at = next(point for point in planned if abs(point["budget"] - 0.69375) < 1e-9)
    assert at["loss"] == pytest.approx(document["plan"]["outlook"]["predicted"], rel=0.2)


def test_a_sweep_is_measured_as_time_allows(fxshare: Run, command: tuple[object, ...]) -> None:
    options = ("--sweep", "-", "--json", "--set", "planner.search=quick")
    asked = fxshare("plan", *command, *options, "--sweep-minutes", "9").json
    # nothing of the trial that was kept is in the way of what a budget of its own measures
    losing = [point for point in asked["sweep"]["planned"] if point["loss"] > 0]
    assert losing
    assert all(point["measured"] is not None for point in losing)
    worst, mildest = losing[0]["measured"], losing[-1]["measured"]
    assert worst > mildest
    alone = fxshare(
        "plan", *command, "--json", "--set", "planner.search=quick",
        "--keep", losing[0]["budget"], "--set", "planner.remeasure=0",
    ).json  # fmt: skip
    trials = {trial["name"]: trial for trial in alone["outlook"]["trials"]}
    assert trials["planned"]["predicted"] == pytest.approx(losing[0]["loss"], rel=1e-9)
    if trials["planned"]["tokens"] == alone["outlook"]["held_back_tokens"]:
        assert trials["planned"]["measured"] == pytest.approx(worst, rel=1e-6)
    none = fxshare("plan", *command, *options, "--sweep-minutes", "0").json
    assert all(point["measured"] is None for point in none["sweep"]["planned"])


def test_a_sweep_starts_where_plans_do(fxshare: Run, command: tuple[object, ...]) -> None:
    floor = ("--set", "planner.floor=0.5", "--sweep", "-", "--json")
    points = fxshare("plan", *command, *floor).json["sweep"]["planned"]
    # a quarter of the weights stays dense, and half of the rest is kept
    assert points[0]["budget"] >= 0.625
    assert points[-1]["budget"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-c", "sharing.yaml", "--sweep", "-", *DATA), "the sharing mode has none; give one"),
        (("-c", "budget.yaml", "--keep", "0.5", "--sweep", "-"), "add --calibration SPEC"),
        (("-c", "budget.yaml", "--keep", "0.5", "--sweep", "x.txt", *DATA), "found .txt"),
        (("--keep", "0.5", "--sweep-minutes", "1", *DATA), "for the budgets of --sweep"),
        (("-c", "sharing.yaml", "--draw", "x.bmp"), "found .bmp"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    fxshare: Run, budget: Path, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("matplotlib")
    ran = fxshare("plan", "no_such:model", *options)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_plan_that_cannot_be_written_is_refused_before_any_work(
    fxshare: Run, tmp_path: Path
) -> None:
    ran = fxshare("plan", "no_such:model", "-o", tmp_path)
    assert (ran.code, ran.out) == (1, "")
    assert f"-o {tmp_path}: expected a file to write, found a folder" in ran.err


# the file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(folder: Path, budget: Path) -> Path:
    """A planned plan in a file."""
    from fxshare.cli import main

    path = folder / "planned.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["plan", "cli_toy:make", "-c", str(budget), "--keep", "0.5", *DATA]
        assert main([*command, "-o", str(path)]) == 0
    return path


def test_an_edited_plan_is_compiled_as_it_is(
    fxshare: Run, command: tuple[object, ...], stored: Path, tmp_path: Path
) -> None:
    plan = json.loads(stored.read_text(encoding="utf-8"))
    path = tmp_path / "edited.json"
    first = plan["groups"].pop(0)
    plan["groups"][0]["rank"] = 2
    path.write_text(json.dumps(plan), encoding="utf-8")
    ran = fxshare("compile", *command, "--plan", path, "--json")
    assert ran.code == 0, ran.err
    groups = {group["name"]: group for group in ran.json["groups"]}
    assert groups[plan["groups"][0]["name"]]["rank"] == 2
    assert first["name"] not in groups
    assert groups[first["slices"][0]]["storage"] == "dense"


def test_compiling_takes_the_budget_too(fxshare: Run, command: tuple[object, ...]) -> None:
    ran = fxshare("compile", *command, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["totals"]["params_kept"] <= 0.7


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g[0].update(rank=999), "rank 999 is outside 1.."),
        (lambda g: g[0].update(out_features=3), "says out_features 3, its slices have"),
        (lambda g: g[0].update(slices=["blocks.0.f"]), "did you mean 'blocks.0.fc'?"),
        (lambda g: g[0].update(colour=1), "colour: unknown key"),
        (lambda g: g[1].update(slices=g[0]["slices"]), "a slice has one basis, once"),
    ],
)
def test_a_file_that_does_not_hold_names_the_group(
    fxshare: Run,
    command: tuple[object, ...],
    stored: Path,
    tmp_path: Path,
    edit: Callable[[Any], None],
    message: str,
) -> None:
    plan = json.loads(stored.read_text(encoding="utf-8"))
    edit(plan["groups"])
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    for ran in (fxshare("compile", *command, "--plan", path), fxshare("inspect", path)):
        assert (ran.code, ran.out) == (1, "")
        assert "wrong.json" in ran.err
        assert plan["groups"][0]["name"] in ran.err
        assert message in ran.err


def test_inspect_shows_a_plan_file(fxshare: Run, stored: Path) -> None:
    ran = fxshare("inspect", stored)
    assert ran.out.startswith("planned mode: 8 sites")
    assert fxshare("inspect", stored, "--json").json == json.loads(stored.read_text())
    ran = fxshare("inspect", stored, "--graph")
    assert ran.code == 2
    assert "a plan is shown as it is" in ran.err


# why ------------------------------------------------------------------------------------------


def test_why_in_a_plan_file(fxshare: Run, stored: Path) -> None:
    plan = json.loads(stored.read_text(encoding="utf-8"))
    group = next(g for g in plan["groups"] if "blocks.0.fc" in g["slices"])
    text = fxshare("inspect", stored, "--why", "blocks.0.fc").out
    assert "weight type fc, layer 0, 12→24, with bias" in text
    assert f"basis {group['name']} of rank {group['rank']}, shared with" in text
    assert "plain storage breaks even at rank" in text
    assert f"predicted loss increase: {group['loss']:.3e} per token" in text
    text = fxshare("inspect", stored, "--why", group["name"]).out
    assert "a basis of blocks.0.fc" in text
    # the plan's file does not say what its configuration was
    text = fxshare("inspect", stored, "--why", "blocks.1.fc").out
    assert "keeps its original weight rows: at the price of" in text
    document = fxshare("inspect", stored, "--why", "blocks.1.fc", "--json").json
    assert document["name"] == "blocks.1.fc"
    ran = fxshare("inspect", stored, "--why", "blocks.0.fcc")
    assert ran.code == 2
    assert "Did you mean 'blocks.0.fc'" in ran.err


def test_why_tells_the_bits_of_each_kind(fxshare: Run, stored: Path, tmp_path: Path) -> None:
    plan = json.loads(stored.read_text(encoding="utf-8"))
    group = next(g for g in plan["groups"] if "blocks.0.fc" in g["slices"])
    group["bits"] = 8
    plan["rounded"] = [{"bits": 4, "slices": ["blocks.1.fc"], "loss": None}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    for name in ("blocks.0.fc", group["name"]):
        text = fxshare("inspect", path, "--why", name).out
        assert f"{group['storage']} storage, 8 bits, " in text
    text = fxshare("inspect", path, "--why", "blocks.1.fc").out
    assert "dense, in no group: its own weight rows in 4 bits" in text
    assert "keeps its original weight rows" not in text


def test_why_in_a_saved_folder_of_a_planned_model(
    fxshare: Run, command: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert fxshare("compile", *command, "-o", out).code == 0
    why = ("inspect", out, "--original", "cli_toy:make", "--why")
    assert "planner.keep_dense has layer 1" in fxshare(*why, "blocks.1.fc").out
    text = fxshare(*why, "blocks.0.fc").out
    assert "relative error" in text
    assert "the group's weighted error" in text
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.svg"
    assert fxshare("inspect", out, "--original", "cli_toy:make", "--draw", picture).code == 0
    assert picture.is_file()


def test_before_planning_there_is_nothing_to_explain_yet(fxshare: Run, budget: Path) -> None:
    keep = ("--set", "budget.params_kept=0.5")
    ran = fxshare("inspect", "cli_toy:make", "-c", budget, *keep, "--why", "blocks.0.fc")
    assert ran.code == 0
    assert "is decided with data" in ran.out
    assert "hidden units" not in ran.out
    units = ("-c", budget, *keep, "--set", "planner.kinds=[basis, units]", "--why", "blocks.0.fc")
    ran = fxshare("inspect", "cli_toy:make", *units)
    assert "is decided with data" in ran.out
    assert "of an MLP with 24 hidden units: blocks.0.fc, read by blocks.0.proj" in ran.out
    ran = fxshare("inspect", "cli_toy:make", "--set", "capture=modules", *units)
    assert "no hidden units are told from what it reads: it stands in no graph" in ran.out
    ran = fxshare("validate", "cli_toy:make", "-c", budget, *keep, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["weights"], ran.json["params_kept"]) == (2304, None)
    ran = fxshare("inspect", "cli_toy:make", "--draw", "x.svg")
    assert ran.code == 2
    assert "is not compiled and has no plan" in ran.err


@pytest.mark.parametrize(
    "option",
    [("--calibration", "ids.npy"), ("--tokens", "80"), ("--length", "20"), ("--padded",)],
)
def test_data_without_a_model_are_refused(fxshare: Run, option: tuple[str, ...]) -> None:
    ran = fxshare("plan", "--work", "w", "--keep", "0.6", *option)
    assert (ran.code, ran.out) == (2, "")
    assert f"{' '.join(option)}: without MODEL nothing is measured" in ran.err
