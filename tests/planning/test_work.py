"""A work folder: what a run computed is there for the next one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxshare
from fxshare.base.unfinished import PARTIAL, hidden
from fxshare.compiling.replan import replan
from fxshare.config import load_config
from fxshare.errors import (
    CalibrationError,
    ConfigError,
    FxShareWarning,
    PlanError,
    StoreError,
)
from fxshare.planning import work as works
from tests.planning.models import MANY, batches, llama, types
from tests.strategies import no_warnings_of_ours

FEW = {**MANY, "weight_types": {name: MANY["weight_types"][name] for name in ("q", "down")}}
CFG = [FEW, {"budget": {"params_kept": 0.7}}]
OTHER = [FEW, {"budget": {"params_kept": 0.6}}]


def data(**keys: Any) -> list[Tensor]:
    return batches(6, rows=2, length=8, **keys)


def compiled(work: Path | None, cfg: Any = CFG, **keys: Any) -> Any:
    keys.setdefault("calibration", data())
    with no_warnings_of_ours():
        return fxshare.compile(llama(), cfg, work=work, **keys)


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal bit for bit."""
    plans = [{**g.fxshare.plan.model_dump(), "outlook": None} for g in (one, other)]
    outlooks = []
    for g in (one, other):
        found = g.fxshare.plan.outlook.model_dump()
        trials = [{**t, "seconds": 0} for t in found["trials"]]
        outlooks.append({**found, "seconds": 0, "trials": trials})
    tensors = zip(one.parameters(), other.parameters(), strict=True)
    return (
        plans[0] == plans[1]
        and outlooks[0] == outlooks[1]
        and all(torch.equal(a, b) for a, b in tensors)
    )


@pytest.fixture(scope="module")
def whole() -> Any:
    """What an uninterrupted run without a folder gives."""
    return compiled(None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    compiled(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "work"))


def test_with_a_folder_and_without(whole: Any, tmp_path: Path) -> None:
    assert same(whole, compiled(tmp_path / "new" / "work"))


def test_a_second_run_computes_nothing_again(
    whole: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("fxshare.calibration.calibrate._gather", never)
    monkeypatch.setattr("fxshare.factors.spectra.Spectra._write", never)
    monkeypatch.setattr("fxshare.planning.work.write_entry", never)
    assert same(whole, compiled(folder))


def test_another_budget_needs_no_calibration_of_the_dense_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compiled(None, OTHER)
    from fxshare.calibration.calibrate import _gather as gather

    calls = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return gather(*args)

    monkeypatch.setattr("fxshare.calibration.calibrate._gather", counted)
    assert same(expected, compiled(folder, OTHER))
    assert len(calls) == 1  # on the model that is compressed half-way
    assert len(list((folder / "plans").iterdir())) == 2


def test_a_plan_is_carried_out_without_data(tmp_path: Path) -> None:
    cfg = [*CFG, {"planner": {"search": "off"}}]  # nothing is held back: the statistics are equal
    made = compiled(tmp_path / "w", cfg)
    plan = made.fxshare.plan
    without = compiled(tmp_path / "w", cfg, plan=plan, calibration=None, example=data()[0])
    with_data = compiled(None, cfg, plan=plan)
    assert without.fxshare.plan.groups == plan.groups
    assert plan.groups
    for several in zip(*(g.parameters() for g in (made, without, with_data)), strict=True):
        assert all(torch.equal(several[0], one) for one in several[1:])


def test_basis_sharing_keeps_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = [FEW, {"group_size": 2, "compression_rate": 0.7}]
    expected = compiled(None, sharing)
    first = compiled(tmp_path / "w", sharing)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("fxshare.calibration.calibrate._gather", never)
    second = compiled(tmp_path / "w", sharing)
    for a, b, c in zip(*(g.parameters() for g in (expected, first, second)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# What it was made from


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"calibration": data(seed=5)}, "other calibration data"),
        ({"calibration": data()[:5]}, "other calibration data"),
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"calibration": data(seed=5), "seed": 5}, "data, and another seed (0, now 5)"),
        ({"loss": lambda output, batch: output.sum()}, "another loss"),
        ({"cfg": [*CFG, {"calibration": {"max_tokens": 20}}]}, "another configuration"),
        (
            {"cfg": [*CFG, {"weight_types": {"q": {"pattern": r".*[01].q_proj$"}}}]},
            "another config",
        ),
        ({"cfg": [*CFG, {"planner": {"search": "off"}}]}, "another configuration"),
    ],
    ids=[
        "data",
        "fewer batches",
        "seed",
        "data of a seed",
        "loss",
        "tokens",
        "patterns",
        "nothing held back",
    ],
)
def test_another_run_is_told_what_differs(change: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(StoreError) as error:
        compiled(folder, **{"cfg": CFG, **change})
    assert said in str(error.value)
    assert "give another folder" in str(error.value)


def test_another_model_and_other_versions(folder: Path) -> None:
    with pytest.raises(StoreError, match="another model, or other weights"):
        fxshare.compile(llama(seed=1), CFG, calibration=data(), work=folder)
    file = folder / "work.json"
    file.write_text(file.read_text().replace("torch ", "torch 0."))
    for again in (compiled, replan):
        with pytest.raises(StoreError, match=r"other versions \(.*torch 0\."):
            again(folder)
    file.unlink()
    with pytest.raises(StoreError, match=r"has no work\.json"):
        replan(folder)
    assert not file.exists()


def test_what_does_not_decide_may_differ(whole: Any, folder: Path) -> None:
    memory = {"calibration": {"max_memory": "16GB"}}
    assert same(whole, compiled(folder, [*CFG, memory]))


@pytest.mark.parametrize("kind", ["file", "full", "broken", "newer", "no data"])
def test_folders_that_are_none(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    keys: dict[str, Any] = {}
    if kind == "file":
        folder.write_text("")
        said = "expected a folder, found a file"
    elif kind == "no data":
        keys, said = {"calibration": None, "example": data()[0]}, "no statistics yet"
    else:
        folder.mkdir()
        content = {"full": None, "broken": "{", "newer": '{"format": 2, "made_from": {}}'}[kind]
        (folder / ("other.txt" if content is None else "work.json")).write_text(content or "")
        said = {"full": "no work.json", "broken": "cannot be read", "newer": "format 2"}[kind]
    plan = compiled(None).fxshare.plan if kind == "no data" else None
    with pytest.raises(StoreError, match=said):
        compiled(folder, plan=plan, **keys)
    if kind == "full":
        assert [one.name for one in folder.iterdir()] == ["other.txt"]


def test_a_run_that_was_killed_at_its_very_beginning(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "lock").write_text("1")
    hidden(folder / "work.json", PARTIAL).write_text('{"form')
    assert same(whole, compiled(folder))


def test_damaged_files_are_computed_again_or_named(whole: Any, folder: Path) -> None:
    for entry in (*folder.rglob("*.spectrum"), *(folder / "plans").rglob("judged/*")):
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    assert same(whole, compiled(folder))
    part = next(folder.glob("statistics/part-0/*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is not what was written"):
        compiled(folder)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr("fxshare.calibration.stored.save_file", full)
        with pytest.raises(StoreError, match="No space left on device"):
            compiled(folder)
    assert same(whole, compiled(folder))


# Who holds it


HOLD = """
import sys, time
from pathlib import Path
from fxshare.base.lock import only_here
with only_here(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once_and_one_that_was_killed(whole: Any, folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"in use by process {other.pid}; wait for its end"):
            compiled(folder)
        other.kill()
    assert same(whole, compiled(folder))


# Without the model


def test_another_budget_without_the_model(folder: Path) -> None:
    found = replan(folder, overrides=["budget.params_kept=0.6"])
    expected = fxshare.plan(
        llama(), [*OTHER, {"planner": {"search": "off"}}], calibration=data()[:5]
    )
    assert found.plan.groups == expected.groups
    assert found.plan.outlook is not None
    assert expected.outlook is not None
    assert found.plan.outlook.predicted == expected.outlook.predicted
    assert found.plan.outlook.bound == expected.outlook.bound
    # and it can be carried out
    made = compiled(folder, OTHER, plan=found.plan, calibration=None, example=data()[0])
    assert made.fxshare.plan.groups == found.plan.groups


def test_the_budget_of_the_run_where_none_is_given(folder: Path) -> None:
    found = replan(folder, shares=[0.5, 0.9])
    assert found.plan.outlook is not None
    assert (
        found.plan.outlook.cost
        <= found.plan.outlook.budget
        == int(0.7 * sum(site.weights for site in found.plan.sites))
    )
    assert found.sweep is not None
    assert [point.budget for point in found.sweep.planned] == [0.5, 0.9]


def test_the_planner_s_options_are_those_of_the_run(tmp_path: Path) -> None:
    options = {"planner": {"strategy": "separate", "search": "off"}}
    made = fxshare.plan(llama(), [*CFG, options], calibration=data(), work=tmp_path)
    assert replan(tmp_path).plan.groups == made.groups
    other = replan(tmp_path, [{"budget": {"params_kept": 0.6}}]).plan
    assert other.outlook is not None
    assert made.outlook is not None
    assert other.outlook.cost < made.outlook.cost


def test_what_cannot_be_planned_without_the_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="was not priced in"):
        replan(folder, overrides=["calibration.relative_floor=1e-4"])
    with pytest.raises(PlanError, match="give MODEL as well"):
        replan(folder, overrides=["budget.params_kept=0.6", "budget.time_kept=0.9"])
    with pytest.raises(StoreError, match=r"has no problem\.json"):
        replan(tmp_path)


def test_a_problem_that_was_edited_is_named_and_written_again(whole: Any, folder: Path) -> None:
    file = folder / "problem.json"
    written = file.read_text()
    for edited, said in (
        (written.replace('"element_size": 4', '"element_size": 8'), "its hash differs"),
        (written.replace("down_proj", "up_proj"), "its hash differs"),
        (written[:-9], "Expecting"),
        ("[]", "list indices"),
        ('{"sites": 3}', "'problem'"),
    ):
        assert edited != written
        file.write_text(edited)
        with pytest.raises(StoreError, match=f"cannot be read: .*{said}.*with MODEL and --calib"):
            replan(folder)
    assert same(whole, compiled(folder))
    assert file.read_text() == written


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("weight_types.q.pattern=.*k_proj$", "weight_types: "),
        ("block_pattern=other_layers\\.(\\d+)", "block_pattern: "),
        ("calibration.max_tokens=20", r"calibration\.max_tokens: "),
        ("planner.labels=sampled", r"planner\.labels: "),
    ],
)
def test_what_was_matched_and_measured_cannot_be_planned_otherwise(
    override: str, said: str, folder: Path
) -> None:
    budget = "budget.params_kept=0.6"
    with pytest.raises(ConfigError, match=said + ".* was made under another one"):
        replan(folder, overrides=[budget, override])
    again = replan(folder, [FEW], overrides=[budget]).plan
    assert again.groups == replan(folder, overrides=[budget]).plan.groups


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["budget.params_kept=0.6", "planner.bits=[16, 8]"], "compete under a budget in bytes"),
        (["planner.kinds=[]"], r"planner\.kinds: "),
        (["group_size=2"], "compression_rate: not given"),
    ],
    ids=["another budget", "that of the run", "none"],
)
def test_options_that_do_not_go_together_are_told_once(
    overrides: list[str], said: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        replan(folder, overrides=overrides)
    assert "one limit of" not in str(error.value)
    assert "found without budget" not in str(error.value)


def test_kinds_that_the_run_did_not_name(folder: Path, tmp_path: Path) -> None:
    own = [
        types("gate", "up", "down"),
        {"budget": {"params_kept": 0.6}, "planner": {"search": "off"}},
    ]
    both = {"planner": {"kinds": ["basis", "units"]}}
    fxshare.plan(llama(), own, calibration=data(), work=tmp_path / "w")
    with pytest.raises(PlanError, match=r"hidden units that '.*' reads were not priced in"):
        replan(tmp_path / "w", [both])
    expected = fxshare.plan(llama(), [*own, both], calibration=data(), work=tmp_path / "w")
    found = replan(tmp_path / "w", [both]).plan
    assert (found.groups, found.units) == (expected.groups, expected.units)
    assert found.units
    # the one whose MLPs are not matched has none of them
    with pytest.warns(FxShareWarning, match="knows no MLP and no attention"):
        replan(folder, [both])


# Killed


SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import fxshare
from tests.planning.test_work import CFG, compiled
print("started", flush=True)
made = compiled(Path(sys.argv[1]))
torch.save([p.detach() for p in made.parameters()], sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Thirty times at a random moment; the folder serves the next run each time."""
    chance = random.Random(0)
    folder, out = tmp_path / "work", tmp_path / "out.pt"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(out)]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        run.stdout.close()
        return run

    begin = time.perf_counter()
    first = start()
    assert first.wait() == 0
    took = time.perf_counter() - begin
    expected = torch.load(out)
    shutil.rmtree(folder)
    for number in range(30):
        out.unlink(missing_ok=True)
        run = start()
        try:
            run.wait(timeout=chance.uniform(0, took / 3))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
        if number % 10 == 9:  # from here on a folder of its own
            last = start()
            assert last.wait() == 0
            found = torch.load(out)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "border",
    [
        "fxshare.planning.budget.write_problem",
        "fxshare.planning.search.Search.run",
        "fxshare.planning.budget._remeasured",
        "fxshare.planning.budget._along",
        "fxshare.compiling.compile.planned_factors",
        "fxshare.compiling.build.rewrite",
    ],
)
def test_ended_at_the_border_of_a_stage(
    border: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    folder = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr(border, killed)
        with pytest.raises(KeyboardInterrupt):
            compiled(folder)
    assert same(whole, compiled(folder))


def test_a_number_is_remembered_exactly(tmp_path: Path) -> None:
    made_from = {"data": "x"}
    for value in (0.1 + 0.2, float("inf"), -0.0, 5e-324):
        with works.opened(tmp_path / "w", made_from, "plan") as work:
            assert work.remembered(("what", value), lambda value=value: value) == value
            assert repr(work.remembered(("what", value), lambda: 1 / 0)) == repr(value)


def test_the_fingerprint_names_no_content(folder: Path) -> None:
    found = json.loads((folder / "work.json").read_text())
    assert set(found["made_from"]) == {"model", "data", "configuration", "loss", "seed", "versions"}
    cfg = load_config(CFG)
    assert works.plan_key(cfg) != works.plan_key(load_config(OTHER))


def test_without_data_a_budget_says_so(tmp_path: Path) -> None:
    with pytest.raises((StoreError, CalibrationError), match="data"):
        compiled(tmp_path / "w", calibration=None, example=data()[0])
