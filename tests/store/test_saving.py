"""What ``save`` does beside the parts of a folder, on the smallest model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare.errors import FxShareWarning, StoreError
from fxshare.models.source import TRANSFORMERS, Source
from fxshare.store.save import _source_now


@pytest.fixture
def gm() -> Any:
    """Compiled without an example call."""
    model = nn.Sequential(nn.Linear(4, 4))
    return fxshare.compile(model, {"weight_types": {"w": {"pattern": "0"}}}, capture="modules")


def _saved(folder: Path) -> Any:
    return json.loads((folder / "fxshare.json").read_text())


def test_why_there_is_no_probe_is_said(gm: Any, tmp_path: Path) -> None:
    fxshare.save(gm, tmp_path / "out")
    manifest = _saved(tmp_path / "out")
    assert manifest["probe"] is None
    assert manifest["no_probe"] == "captured without example inputs"
    assert (manifest["dtype"], manifest["site_dtypes"]) == ("float32", {})
    assert (manifest["training"], manifest["training_differs"]) == (gm.training, [])


def test_a_probe_leaves_nothing_to_say(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    cfg = {"weight_types": {"w": {"pattern": "0"}}}
    gm: Any = fxshare.compile(nn.Sequential(nn.Linear(4, 4)), cfg, calibration=[x])
    gm.train()
    for module in list(gm.modules())[1:]:
        module.training = False
    fxshare.save(gm, tmp_path / "out")
    manifest = _saved(tmp_path / "out")
    assert manifest["no_probe"] is None
    assert len(manifest["probe"]["values"]) == 8
    assert manifest["training"]
    assert manifest["training_differs"] == [name for name, _ in gm.named_modules() if name]


def test_hooks_of_the_root_are_warned_of(gm: Any, tmp_path: Path) -> None:
    gm.register_forward_hook(lambda *_: None)
    with pytest.warns(FxShareWarning, match="itself has forward hooks, which no folder holds"):
        fxshare.save(gm, tmp_path / "out")


def test_the_tokenizer_is_written_too(gm: Any, tmp_path: Path) -> None:
    def save_pretrained(folder: str) -> None:
        (Path(folder) / "vocab.txt").write_text("a")

    tokenizer = SimpleNamespace(save_pretrained=save_pretrained)
    fxshare.save(gm, tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a"


def test_what_is_written_is_looked_at_before_it_takes_its_place(gm: Any, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def looked_at(folder: Path) -> None:
        seen.append({path.name for path in folder.iterdir()})
        assert not (tmp_path / "out").exists()

    fxshare.save(gm, tmp_path / "out", written=looked_at)
    assert seen == [{path.name for path in (tmp_path / "out").iterdir()}]
    assert "fxshare.json" in seen[0]


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_of_nothing_is_refused(size: int, gm: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"max_shard_bytes: expected at least 1, found {size}"):
        fxshare.save(gm, tmp_path / "out", max_shard_bytes=size)
    assert not list(tmp_path.iterdir())
    fxshare.save(gm, tmp_path / "out", max_shard_bytes=1)


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"top_k": 1}, SimpleNamespace(to_dict=lambda: {"top_k": 2}), {"top_k": 2}),
        ({"top_k": 1}, None, {"top_k": 1}),
        (None, SimpleNamespace(to_dict=lambda: {"top_k": 2}), None),
        (None, None, None),
    ],
)
def test_defaults_of_generate_are_those_of_now(then: Any, now: Any, expected: Any) -> None:
    record: Any = SimpleNamespace(source=Source(TRANSFORMERS, "a:B", {}, then))
    model: Any = SimpleNamespace() if now is None else SimpleNamespace(generation_config=now)
    assert _source_now(model, record) == Source(TRANSFORMERS, "a:B", {}, expected)
