"""The commands, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxshare import embedded as fxshare_demo
from fxshare.base.files import aside, swap_in
from tests import stops
from tests.cli.conftest import ROOT, STORIES, Ran

Run = Callable[..., Ran]

GPT2 = (
    "-c",
    ROOT / "configs" / "gpt2.yaml",
    "--set",
    "weight_types.attn_c_attn.n_head=2",
)
DATA = ("--calibration", "ids.npy", "--length", "20")


# validate -------------------------------------------------------------------------------------


def test_a_valid_configuration(fxshare: Run) -> None:
    ran = fxshare("validate", "-c", "sharing.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("valid: sharing mode, 2 weight types: fc, proj")


def test_what_a_configuration_matches(fxshare: Run) -> None:
    ran = fxshare("validate", "cli_toy:make", "-c", "sharing.yaml", "--json")
    assert ran.code == 0
    counts = {t["type"]: (t["sites"], t["modules"], t["layers"]) for t in ran.json["types"]}
    assert counts == {"fc": (4, 4, 4), "proj": (4, 4, 4)}
    assert ran.json["unmatched"] == ["head"]
    text = fxshare("validate", "cli_toy:make", "-c", "sharing.yaml").out
    assert "1 linear modules match no pattern and stay as they are: head" in text


def test_a_wrong_key_is_named_with_a_suggestion(fxshare: Run) -> None:
    ran = fxshare("validate", "-c", "sharing.yaml", "--set", "compresion_rate=0.5")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: --set compresion_rate=0.5: compresion_rate: unknown key.")
    assert "Did you mean 'compression_rate'?" in ran.err


def test_a_pattern_that_matches_nothing(fxshare: Run) -> None:
    override = "weight_types.fc.pattern='.*fcc$'"
    ran = fxshare("validate", "cli_toy:make", "-c", "sharing.yaml", "--set", override)
    assert ran.code == 1
    assert "matches no module" in ran.err
    assert "the nearest linear modules are 'blocks.3.fc'" in ran.err


def test_a_configuration_in_the_place_of_the_model(fxshare: Run) -> None:
    ran = fxshare("validate", "sharing.yaml")
    assert ran.code == 2
    assert "-c sharing.yaml" in ran.err


def test_validating_no_configuration(fxshare: Run) -> None:
    ran = fxshare("validate", "cli_toy:make")
    assert ran.code == 2
    assert "give it with -c FILE.yaml" in ran.err


# models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("gpt2", 2, "'gpt2' is not a model: expected a folder"),
        ("embeded", 2, "Did you mean embedded?"),
        ("sharing.yaml", 2, "it is a file"),
        ("no_such_module:make", 2, "no module 'no_such_module'"),
        ("cli_toy:mak", 2, "has no 'mak'. Did you mean 'make'?"),
        ("cli_toy:text", 2, "returns one, found a str"),
        ("cli_toy:broken", 1, "the factory raised RuntimeError: no weights here"),
    ],
)
def test_names_that_are_no_model(fxshare: Run, name: str, code: int, message: str) -> None:
    ran = fxshare("inspect", name)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_module_that_is_ready_needs_no_call(fxshare: Run) -> None:
    assert fxshare("inspect", "cli_toy:ready", "--json").json["class"] == "Toy"


def test_a_folder_that_is_not_ours(fxshare: Run, tmp_path: Path) -> None:
    ran = fxshare("inspect", tmp_path)
    assert ran.code == 1
    assert "expected fxshare.json" in ran.err
    assert "found nothing" in ran.err
    (tmp_path / "notes.txt").write_text("x")
    assert "found notes.txt" in fxshare("inspect", tmp_path).err


def test_a_folder_without_weights(fxshare: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    ran = fxshare("inspect", tmp_path)
    assert ran.code == 1
    assert "expected weights" in ran.err


def test_a_damaged_saved_folder(fxshare: Run, saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    (damaged / "plan.json").write_text("{}")
    ran = fxshare("inspect", damaged, "--original", "cli_toy:make")
    assert ran.code == 1
    assert "plan.json" in ran.err


# plan and compile -----------------------------------------------------------------------------


def test_a_plan_can_be_edited_and_compiled(fxshare: Run, tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.json"
    ran = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml", "-o", path, "--json")
    assert ran.code == 0
    assert ran.json == json.loads(path.read_text(encoding="utf-8"))
    plan = ran.json
    plan["groups"][0]["rank"] = 2
    path.write_text(json.dumps(plan), encoding="utf-8")
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", *DATA)
    report = fxshare(*command, "--plan", path, "--json").json
    assert report["groups"][0]["rank"] == 2
    assert report["groups"][1]["rank"] == plan["groups"][1]["rank"] != 2


def test_the_table_of_a_plan(fxshare: Run) -> None:
    text = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml").out
    assert text.splitlines()[0] == "sharing mode: 8 sites, 8 slices, 4 groups"
    assert "break-even" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p["groups"][0].update(rank=0), "rank 0 is outside 1.."),
        (lambda p: p["groups"][0].update(slices=["x"]), "'x' is not a slice"),
        (lambda p: p.update(colour=1), "colour"),
        (lambda p: p.update(version=99), "upgrade fxshare"),
    ],
)
def test_a_plan_that_does_not_hold(
    fxshare: Run, tmp_path: Path, edit: Callable[[Any], None], message: str
) -> None:
    plan = fxshare("plan", "cli_toy:make", "-c", "sharing.yaml", "--json").json
    edit(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", "--plan", path)
    assert ran.code == 1
    assert "plan.json" in ran.err
    assert message in ran.err


def test_a_plan_of_another_configuration(fxshare: Run, gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert fxshare("plan", gpt2, *GPT2, "-o", path).code == 0
    whole = ("--set", "weight_types.attn_c_attn.split=qkv")
    ran = fxshare("compile", gpt2, *GPT2, *whole, "--plan", path)
    assert ran.code == 1
    assert "is not what the configuration matches in this model" in ran.err
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", "--plan", path)
    assert ran.code == 1


def test_a_plan_that_is_no_file(fxshare: Run) -> None:
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", "--plan", "nowhere.json")
    assert ran.code == 1
    assert "nowhere.json: cannot be read" in ran.err


def test_a_rate_above_dense_warns_on_stderr(fxshare: Run) -> None:
    ran = fxshare(
        "plan", "cli_toy:make", "-c", "sharing.yaml", "--set", "compression_rate=1.3", "--json"
    )
    assert ran.code == 0
    assert ran.json["mode"] == "sharing"
    assert ran.err.count("warning: ") == 1
    assert "store more than their dense weights" in ran.err


def test_the_report(fxshare: Run) -> None:
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", *DATA)
    assert ran.code == 0
    assert "8 sites in 4 groups" in ran.out
    assert "calibrated on 400 tokens in 10 batches" in ran.out
    assert "the factory talks" not in ran.out
    assert "the factory talks" in ran.err


def test_calibration_takes_a_seeded_choice_of_windows(fxshare: Run) -> None:
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", *DATA, "--tokens", "100", "--json")
    found = [fxshare(*command, "--seed", seed).json for seed in (0, 0, 1)]
    errors = [[g["weighted_error"] for g in report["groups"]] for report in found]
    assert found[0]["calibration"]["tokens"] == 100
    assert errors[0] == errors[1] != errors[2]


def test_capture_is_chosen(fxshare: Run) -> None:
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", *DATA, "--json")
    assert fxshare(*command).json["front_end"] == "fx"
    assert fxshare(*command, "--capture", "modules").json["front_end"] == "modules"
    assert fxshare(*command, "--capture", "onnx").code == 2


def test_token_ids_are_made_up_for_a_graph_without_data(fxshare: Run) -> None:
    report = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", "--json").json
    assert report["front_end"] == "fx"
    assert report["calibration"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--calibration", "none.txt", "--length", "8"), 1, "none.txt: no such file"),
        (("--calibration", "sharing.yaml", "--length", "8"), 1, "found .yaml"),
        (("--calibration", "large.npy", "--length", "8"), 1, "0 to 39, found 40 at position 400"),
        (("--calibration", "ids.npy"), 2, "give --length L"),
        (("--calibration", "ids.npy", "--length", "500"), 1, "at least 500 tokens"),
        (("--calibration", "stdlib", "--length", "8"), 1, "text needs a tokenizer"),
        (("--tokens", "8"), 2, "give --calibration SPEC"),
        (("--length", "8"), 2, "give --calibration SPEC"),
        (("--batch-size", "0"), 2, "--batch-size"),
    ],
)
def test_data_that_does_not_do(
    fxshare: Run, options: tuple[str, ...], code: int, message: str
) -> None:
    ran = fxshare("compile", "cli_toy:make", "-c", "sharing.yaml", *options)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


def test_fewer_tokens_than_asked_for_are_used_with_a_warning(fxshare: Run) -> None:
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", *DATA, "--tokens", "1000", "--json")
    ran = fxshare(*command)
    assert ran.json["calibration"]["tokens"] == 400
    assert "warning: ids.npy: 50 windows of 20 tokens were asked for, the data has 20" in ran.err


def test_output_folders_are_refused_before_any_work(fxshare: Run, tmp_path: Path) -> None:
    command = ("compile", "no_such:model", "-c", "sharing.yaml", "-o")
    ran = fxshare(*command, tmp_path)
    assert ran.code == 1
    assert "exists; choose another folder, or replace it with --force" in ran.err
    (tmp_path / "thesis.txt").write_text("x")
    ran = fxshare(*command, tmp_path, "--force")
    assert ran.code == 1
    assert "was not written by fxshare" in ran.err
    assert (tmp_path / "thesis.txt").is_file()
    ran = fxshare(*command, tmp_path / "thesis.txt", "--force")
    assert "found a file" in ran.err
    for work in ("out", "out/work"):
        ran = fxshare(*command, tmp_path / "out", "--work", tmp_path / work)
        assert "expected a folder outside of -o" in ran.err
        assert ran.code == 2
    beside = fxshare(*command, tmp_path / "work" / "out", "--work", tmp_path / "work")
    assert "there is no module" in beside.err


def test_saving_over_an_older_result(fxshare: Run, tmp_path: Path) -> None:
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", "-o", tmp_path / "out", "--json")
    assert fxshare(*command).json["saved_to"] == str(tmp_path / "out")
    assert fxshare(*command).code == 1
    assert fxshare(*command, "--force").code == 0


# verify, inspect, eval on a saved folder ------------------------------------------------------


def test_verify(fxshare: Run, saved: Path) -> None:
    ran = fxshare("verify", "cli_toy:make", saved)
    assert ran.code == 0
    assert ran.out.startswith("equal: sharing mode")
    ran = fxshare("verify", "cli_toy:make", saved, "--data", "ids.npy", "--length", "16", "--json")
    assert ran.code == 0
    assert ran.json["ok"] is True
    assert ran.json["checks"][0]["what"] == "given 0 2×16"


def test_verify_against_other_weights_fails(fxshare: Run, saved: Path) -> None:
    ran = fxshare("verify", "cli_toy:other", saved, "--json")
    assert ran.code == 3
    assert ran.json["ok"] is False
    assert fxshare("verify", "cli_toy:other", saved).out.startswith("DIFFERENT")


def test_verify_against_another_model(fxshare: Run, saved: Path) -> None:
    ran = fxshare("verify", "cli_toy:wide", saved)
    assert ran.code == 1
    assert "Traceback" not in ran.err


def test_verify_of_what_was_not_compiled(fxshare: Run) -> None:
    ran = fxshare("verify", "cli_toy:make", "cli_toy:other")
    assert ran.code == 1
    assert "was not made by fxshare.compile" in ran.err


def test_a_saved_folder_of_a_class_of_ones_own_asks_for_it(fxshare: Run, saved: Path) -> None:
    ran = fxshare("inspect", saved)
    assert ran.code == 1
    assert "cli_toy:Toy" in ran.err
    assert fxshare("inspect", saved, "--original", "cli_toy:make").code == 0


def test_inspect_a_saved_folder(fxshare: Run, saved: Path) -> None:
    command = ("inspect", saved, "--original", "cli_toy:make")
    found = fxshare(*command, "--json").json
    assert found["report"]["mode"] == "sharing"
    assert [s["site"] for s in found["sites"]][:2] == ["blocks.0.fc", "blocks.0.proj"]
    assert found["sites"][0]["slices"][0]["basis"] == "basis_fc_0_1"
    assert "modules that read it" in fxshare(*command).out
    assert "rows there" in fxshare(*command, "--slices").out
    assert "def forward(self, ids)" in fxshare(*command, "--graph").out
    assert fxshare(*command, "-c", "sharing.yaml").code == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.fc", "basis basis_fc_0_1 of rank 12, shared with blocks.1.fc"),
        ("head", "no pattern matches this Linear"),
        ("embed", "only nn.Linear and Conv1D"),
        ("blocks.0", "rewritten inside it: blocks.0.fc, blocks.0.proj"),
    ],
)
def test_why_in_a_saved_folder(fxshare: Run, saved: Path, name: str, expected: str) -> None:
    ran = fxshare("inspect", saved, "--original", "cli_toy:make", "--why", name)
    assert ran.code == 0
    if "rank" in expected:
        expected = expected.split(" of rank")[0]
        assert "shared with blocks.1.fc" in ran.out
        assert "relative error" in ran.out
    assert expected in ran.out


def test_why_of_a_name_that_is_not_there(fxshare: Run) -> None:
    ran = fxshare("inspect", "cli_toy:make", "--why", "blocks.0.fcc")
    assert ran.code == 2
    assert "Did you mean 'blocks.0.fc'" in ran.err


def test_why_under_a_configuration(fxshare: Run) -> None:
    command = ("inspect", "cli_toy:make", "-c", "sharing.yaml")
    pattern = ("--set", "weight_types.fc.pattern=fc")
    ran = fxshare(*command, *pattern, "--why", "blocks.0.fc")
    assert ran.code == 1
    assert "matches no module" in ran.err
    both = ("--set", "weight_types.fc.pattern='.*blocks.*(fc|gate)$'")
    assert "is a Bilinear" in fxshare(*command, *both, "--why", "blocks.0.gate").out
    assert "give -c FILE.yaml" in fxshare("inspect", "cli_toy:make", "--why", "head").out


def test_why_of_a_slice(fxshare: Run, gpt2: Path) -> None:
    command = ("inspect", gpt2, *GPT2)
    ran = fxshare(*command, "--why", "transformer.h.1.attn.c_attn.k.1")
    assert "rows 24:32 of transformer.h.1.attn.c_attn" in ran.out
    assert "keeps its original weight rows" in ran.out


def test_inspect_a_model(fxshare: Run, gpt2: Path) -> None:
    found = fxshare("inspect", gpt2, "--json").json
    tied = {line["module"]: line["shares_weight_with"] for line in found["linears"]}
    assert tied["lm_head"] == ["transformer.wte"]
    assert tied["transformer.h.0.attn.c_attn"] == []
    assert "def forward(self, input_ids" in fxshare("inspect", gpt2, "--graph").out


def test_eval_side_by_side(fxshare: Run, saved: Path) -> None:
    command = ("eval", saved, "--against", "cli_toy:make", "--data", "ids.npy", "--length", "30")
    ran = fxshare(*command, "--json")
    assert ran.code == 0
    assert [r["model"] for r in ran.json["results"]] == [str(saved), "cli_toy:make"]
    assert {r["tokens"] for r in ran.json["results"]} == {13 * 29}
    text = fxshare(*command, "--protocol", "B").out
    assert text.startswith("protocol B (Basis Sharing")
    assert "times that of cli_toy:make" in text
    turned = ("eval", "cli_toy:make", "--against", saved, "--data", "ids.npy", "--length", "30")
    assert fxshare(*turned, "--json").json["results"][0]["nll"] == ran.json["results"][1]["nll"]


def test_exact_mode_evaluates_to_the_same(fxshare: Run, gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fxshare("compile", gpt2, *GPT2, "-o", out).code == 0
    assert fxshare("verify", gpt2, out).code == 0
    # the model's own window length is 32
    ran = fxshare("eval", out, "--against", gpt2, "--data", "ids.npy", "--json")
    assert ran.json["length"] == 32
    left, right = (r["nll"] for r in ran.json["results"])
    assert left == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("cli_toy:nan", "--data", "ids.npy", "--length", "8"), 3, "not finite in window 0"),
        (("cli_toy:make", "--data", "large.npy", "--length", "8"), 1, "found 40 at position 400"),
        (("cli_toy:make", "--length", "8"), 2, "--data"),
        (("cli_toy:make", "--data", "ids.npy", "--protocol", "C"), 2, "--protocol"),
        (
            ("cli_toy:make", "--data=ids.npy", "--length=8", "--protocol=B", "--tokens=80"),
            2,
            "leave --tokens out",
        ),
    ],
)
def test_evaluations_that_fail(
    fxshare: Run, options: tuple[str, ...], code: int, message: str
) -> None:
    ran = fxshare("eval", *options)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


def test_windows_longer_than_the_model_reads(fxshare: Run, gpt2: Path) -> None:
    ran = fxshare("eval", gpt2, "--data", "ids.npy", "--length", "64")
    assert ran.code == 2
    assert "was made for at most 32 tokens" in ran.err


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the data folder beside the repository")
def test_a_real_model(fxshare: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = f"{STORIES}/tokens.safetensors"
    ran = fxshare("eval", STORIES, "--data", data, "--length", "256")
    assert ran.code == 1
    assert "choose one as tokens.safetensors:NAME from calibration, heldout" in ran.err
    ran = fxshare("eval", STORIES, "--data", f"{data}:heldout", "--tokens", "1024", "--json")
    assert ran.code == 0
    # 512 is what the model reads at once; the published validation loss is 1.30
    assert ran.json["length"] == 512
    assert 1.0 < ran.json["results"][0]["nll"] < 1.7


# schema, demo ---------------------------------------------------------------------------------


def test_schema(fxshare: Run) -> None:
    plain, as_json = fxshare("schema"), fxshare("schema", "--json")
    assert plain.out == as_json.out
    assert "weight_types" in plain.json["properties"]


def test_the_embedded_model_is_missing(fxshare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxshare_demo, "files", lambda package: Path("nowhere"))
    ran = fxshare("inspect", "embedded")
    assert ran.code == 1
    assert "expected the packaged file" in ran.err


def test_demo_passes_its_options_on(
    fxshare: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fxshare.bench import demo as run

    asked: dict[str, Any] = {}
    row = run.Row("dense", 2.0, 1.0, 10, 40, 1000.0, "class Reader:")
    machine: dict[str, object] = {"cpu": "a CPU", "threads": 2, "torch": "2", "python": "3"}
    found = run.Demo(machine, 100, 3, 999, (row,), {}, 1.0)

    def demo(**options: Any) -> run.Demo:
        asked.update(options)
        return found

    monkeypatch.setattr(run, "demo", demo)
    ran = fxshare("demo", "--quick", "--refine", "-o", tmp_path, "--json")
    assert ran.code == 0
    assert ran.json["held_out_bytes"] == 999
    assert (asked["quick"], asked["refine"], asked["out"]) == (True, True, tmp_path)
    assert "class Reader:" in fxshare("demo").out
    assert (asked["quick"], asked["refine"]) == (False, False)


def test_a_folder_whose_replacement_was_broken_off_is_found_again(
    fxshare: Run, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(saved, out)

    def replaced() -> None:
        with aside(out) as new:
            shutil.copytree(saved, new, dirs_exist_ok=True)
            swap_in(new, out)

    whole = stops.run(replaced, tmp_path, exchanging=False)
    renames = [n for n, each in enumerate(whole.operations) if each.startswith("os.rename")]
    assert stops.run(replaced, tmp_path, at=renames[-1], exchanging=False).code == -9
    assert not out.exists()
    ran = fxshare("export", out, tmp_path / "dense", "--to", "dense", "--original", "cli_toy:make")
    assert "earlier run ended in the middle of replacing it" in ran.err
    assert ran.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
