"""``to="aoti"``: AOTInductor's own loader runs what was compiled."""

from __future__ import annotations

import importlib
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import ExportError
from tests.exporting import build

aoti = importlib.import_module("fxshare.exporting.targets.aoti")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class TwoLayers(nn.Module):
    """The least that shares a basis: a C++ compiler takes seconds per kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, T, 256)`` to a dictionary of the same."""
        return {"y": self.layers[1](torch.tanh(self.layers[0](x)))}


@needs_compiler
def test_the_package_computes_what_the_model_does(tmp_path: Path) -> None:
    cfg = {"weight_types": {"a": {"pattern": "layers"}}, "block_pattern": r"layers\.(\d)"}
    with torch.random.fork_rng():
        original = TwoLayers()
    x = torch.randn(5, 9, 256, generator=torch.Generator().manual_seed(0))
    gm = fxshare.compile(original, {**cfg, **build.SHARING}, example=x)
    done = fxshare.export(gm, tmp_path / "m.pt2", to="aoti")
    assert (done.batch_varies, done.sequence_varies) == (True, True)
    found = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))(x=x)
    assert set(found) == {"y"}
    assert worst(gm(x), found).relative <= tolerance(torch.float32, 4)
    # the numbers of the basis that both layers read are in the package once
    (name,) = (group.name for group in gm.fxshare.plan.groups)
    row = gm.get_parameter(f"{name}.weight")[0].detach().numpy().tobytes()
    with zipfile.ZipFile(tmp_path / "m.pt2") as package:
        assert sum(package.read(entry).count(row) for entry in package.namelist()) == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mode", build.MODES)
def test_a_transformer(mode: str, tmp_path: Path) -> None:
    gm = build.toy(mode)
    fxshare.export(gm, tmp_path / "m.pt2", to="aoti")
    x = build.ids()
    found = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))(idx=x)
    assert worst(gm(x), found).relative <= tolerance(torch.float32, 17)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match=r"no g\+\+ or clang\+\+ on the PATH.*'pt2'"):
        fxshare.export(build.toy("sharing"), tmp_path / "m.pt2", to="aoti")
