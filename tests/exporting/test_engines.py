"""Exports in the engines that run them, and ``fxshare verify --on``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fxshare
from fxshare.cli import main
from fxshare.errors import ConfigError, FxShareWarning
from fxshare.exporting.certifying.certificate import certificate_path, read_certificate
from fxshare.exporting.engines import matrix, worker
from fxshare.exporting.served.reading import own_modules
from tests.exporting import build
from tests.zoo.families import family

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gm() -> Any:
    """Tests must not change it."""
    return build.compiled_transformers("llama", build.transformers_model("llama", use_cache=True))


@pytest.fixture(scope="module")
def served(gm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "served"
    fxshare.export(gm, path, to="vllm")
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in this process, which a new one takes seconds to get to."""

    def answer(job: Mapping[str, Any], python: str | None) -> dict[str, Any]:
        with own_modules():
            try:
                version, run = worker.ENGINES[job["engine"]](job)
            except ModuleNotFoundError as error:
                return {"missing": error.name}
            tokens, logits = run()
        found = {"version": version, "tokens": tokens, "logits": logits, "seconds": 0.5}
        return {**found, "resident": worker.resident()}

    monkeypatch.setattr(matrix, "_answer", answer)


def test_a_process_of_its_own(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in served.iterdir()}
    assert main(["verify", str(served), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {row["engine"]: row for row in found["engines"]}
    assert set(by_name) == {"transformers", "vllm"}
    row = by_name["transformers"]
    assert row["state"] == "equal"
    assert row["gap"] < 1e-4
    assert row["tokens_per_second"] > 0
    assert row["resident"] > 10**7
    if by_name["vllm"]["state"] == "not installed":
        assert "vllm cannot be imported" in by_name["vllm"]["note"]
    assert found["changed"] == []
    assert {p.name: p.read_bytes() for p in served.iterdir()} == before


@pytest.mark.usefixtures("here")
def test_weights_that_were_changed_are_told(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m"
    shutil.copytree(served, path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(path), "--on", "transformers"]) == 3
    out = capsys.readouterr().out
    assert "differs" in out
    assert "prompt 0, token 0:" in out
    assert "model.safetensors was changed since it was certified" in out
    # the same tokens of other files are told as well
    shutil.copyfile(served / "model.safetensors", path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    assert main(["verify", str(path), "--on", "transformers"]) == 3
    out = capsys.readouterr().out
    assert "equal" in out
    assert "tokenizer.json was added since it was certified" in out


@pytest.mark.usefixtures("here")
def test_code_that_is_not_as_it_was_certified_is_not_run(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("modeling_fxshare.py", "raise SystemExit('ran')"), ("more.py", "")):
        path = tmp_path / name
        shutil.copytree(served, path)
        (path / name).write_text(text)
        for engine in ("transformers", "vllm"):
            row = matrix.row_of(engine, path)
            assert (row.state, row.note.partition(" ")[0]) == ("not run", name)
        assert main(["verify", str(path)]) == 3
        assert f"{name} is code of the folder and not as it was" in capsys.readouterr().out


def test_an_export_that_no_engine_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fxshare.export(build.toy("sharing"), tmp_path / "code", to="py")
    assert main(["verify", str(tmp_path / "code")]) == 0
    assert "no engine of --on runs exports to 'py'" in capsys.readouterr().out
    (tmp_path / "code" / "more.txt").write_text("")
    assert main(["verify", str(tmp_path / "code")]) == 3
    assert "more.txt was added since it was certified" in capsys.readouterr().out


def test_an_edited_certificate(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m"
    shutil.copytree(served, path)
    text = certificate_path(path).read_text()
    certificate_path(path).write_text(text.replace('"equal": true', '"equal": false'))
    assert main(["verify", str(path)]) == 1
    assert "was edited since it was written" in capsys.readouterr().err
    certificate_path(path).unlink()
    assert main(["verify", str(path)]) == 2
    assert "an export with its certificate" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_graphs_that_take_whole_texts_at_fixed_sizes(tmp_path: Path) -> None:
    toy = build.toy("sharing")
    fxshare.export(toy, tmp_path / "m.pt2", to="pt2", dynamic=False, example=build.ids(2, 7))
    certificate = read_certificate(tmp_path / "m.pt2")
    assert (certificate.rows, certificate.width, certificate.inputs) == (2, 7, ("idx",))
    row = matrix.row_of("pt2", tmp_path / "m.pt2")
    assert row.state == "equal", row
    other = matrix.row_of("onnx", tmp_path / "m.pt2")
    assert (other.state, other.ok) == ("not run", True)
    assert "runs exports to 'onnx', and this is one to 'pt2'" in other.note


@pytest.mark.usefixtures("here")
def test_a_saved_folder_on_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = build.compiled_transformers("gpt2", build.transformers_model("gpt2"))
    fxshare.save(gpt2, tmp_path / "out")
    monkeypatch.setitem(worker.ENGINES, "vllm", _missing)
    command = ["verify", str(tmp_path / "out"), "--on", "transformers,vllm,pt2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    states = {row["engine"]: row["state"] for row in found["engines"]}
    assert states == {"transformers": "equal", "vllm": "not installed", "pt2": "equal"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert "or --on with some of" in capsys.readouterr().err


def _missing(job: Mapping[str, Any]) -> Any:
    raise ModuleNotFoundError("No module named 'vllm'", name="vllm")


@pytest.mark.usefixtures("here")
def test_what_an_engine_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = family("bert")
    encoder = fxshare.compile(bert.model(), bert.config, example=bert.call())
    fxshare.export(encoder, tmp_path / "bert", to="vllm")
    row = matrix.row_of("transformers", tmp_path / "bert")
    assert (row.state, row.ok) == ("not run", True)
    assert "it makes no tokens" in row.note
    falcon = family("falcon")
    refused = fxshare.compile(falcon.model(), falcon.config, example=falcon.call())
    fxshare.save(refused, tmp_path / "out")
    assert main(["verify", str(tmp_path / "out"), "--on", "transformers"]) == 0
    out = capsys.readouterr().out
    assert "not run" in out
    assert "computes by itself" in out


def test_an_engine_that_ends_without_an_answer(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such device' >&2\nexit 4\n")
    broken.chmod(0o755)
    command = ["verify", str(served), "--on", "transformers", "--python"]
    assert main([*command, f"transformers={broken}"]) == 3
    out = capsys.readouterr().out
    assert "failed" in out
    assert "ended with 4: no such device" in out


def test_a_version_that_was_not_tested(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = read_certificate(served)
    said = {
        "version": "9.1.0",
        "tokens": [list(row) for row in certificate.expected],
        "logits": [list(row) for row in certificate.logits],
        "seconds": 1.0,
        "resident": 5,
    }
    monkeypatch.setattr(matrix, "_answer", lambda job, python: said)
    with pytest.warns(FxShareWarning, match=r"transformers 9\.1\.0 is outside the versions"):
        row = matrix.row_of("transformers", served)
    assert (row.state, row.gap, row.tokens_per_second) == ("equal", 0.0, 36.0)
    # another token that is as likely is a tie, one that is not differs, and so does one too few
    said["version"] = "5.20.0"
    said["tokens"][1][3] += 1
    margins = [list(row) for row in certificate.margins]
    assert margins[1][3] > 1e-3
    margins[1][3] = 1e-9
    with monkeypatch.context() as patch:
        tied = replace(certificate, margins=tuple(map(tuple, margins)))
        patch.setattr(matrix, "read_certificate", lambda export: tied)
        row = matrix.row_of("transformers", served)
        assert (row.state, row.ok) == ("tie", True)
    row = matrix.row_of("transformers", served)
    assert (row.state, row.ok) == ("differs", False)
    assert row.note.startswith("prompt 1, token 3:")
    said["tokens"][0] = said["tokens"][0][:-1]
    assert matrix.row_of("transformers", served).state == "differs"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--on", "transformer"], "expected some of transformers, vllm", 2),
        (["other", "--on", "pt2"], "--on takes one folder", 2),
        (["--on", "pt2", "--python", "pt2"], "expected ENGINE=PATH", 2),
        (["--on", "pt2", "--python", "pt3=/bin/python"], "found 'pt3'", 2),
        (["--on", "pt2", "--python", "pt2=no/python"], "found 'no/python'", 2),
        (["--on", "pt2", "--python", "onnx=/bin/sh"], "an engine of --on, which has pt2", 2),
        (["--on", "pt2", "--data", "stdlib"], "--data: a model and OUT are compared on data", 2),
        (["--length", "8"], "--length: a model and OUT are compared on data", 2),
        (["other", "--python", "pt2=/bin/sh"], "give it with --on ENGINES", 2),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    code: int,
    served: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", str(served), *arguments]) == code
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--on: expected some of"):
        matrix.engines_of(["tensorrt"])
