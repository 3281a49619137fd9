"""``fxshare export``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fxshare
from fxshare.base.numerics import worst
from fxshare.cli import main
from fxshare.embedded import load_embedded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a few of its linears in shared bases, saved."""
    path = tmp_path_factory.mktemp("export") / "out"
    cfg = {
        "weight_types": {"fc": {"pattern": r".*\.h\.[01]\.mlp\.c_fc$"}},
        "block_pattern": r"h\.(\d+)",
        "group_size": 2,
        "compression_rate": 0.5,
    }
    ids = torch.randint(3072, (2, 12), generator=torch.Generator().manual_seed(0))
    gm = fxshare.compile(load_embedded(), cfg, example=ids)
    fxshare.save(gm, path)
    return path


def test_dense(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "m.safetensors"
    assert main(["export", str(folder), str(weights), "--to", "dense", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["target"] == "dense"
    assert done["distance"]["relative"] <= done["limit"]
    model = load_embedded()
    model.load_state_dict(load_file(weights), strict=True)
    gm = fxshare.load(folder)
    ids = torch.arange(30).view(3, 10)
    assert worst(gm(ids), model(ids)).relative <= done["limit"]


def test_an_existing_target_and_other_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.safetensors"
    target.write_text("older")
    command = ["export", str(folder), str(target), "--to", "dense"]
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert target.read_text() == "older"
    assert main(["export", str(folder), str(target), "--to", "py", "--force"]) == 1
    assert "is a file and this export is a folder" in capsys.readouterr().err
    assert main(["export", "embedded", str(tmp_path / "m.pt2"), "--to", "pt2"]) == 2
    assert "made from a compiled model" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "m.pt2"), "--to", "pt3"]) == 2
    assert main(["export", str(folder), str(tmp_path / "m.pt2"), "--to", "onnx"]) == 1
    assert "ends in .onnx" in capsys.readouterr().err
