"""``to="pt2"``: what torch alone loads is what was compiled."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fxshare
from fxshare.base.numerics import tolerance, worst
from tests.exporting import build

DEPTH = 2 * 8 + 1

_ALONE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fxshare", "passes", "transformers", "tests"}:
            raise ImportError(f"{name} is not needed here")

sys.meta_path.insert(0, Refused())
import torch
file, given, result = sys.argv[1:]
model = torch.export.load(file).module()
torch.save(model(**torch.load(given)), result)
assert "fxshare" not in sys.modules
"""


def run_alone(file: Path, folder: Path, **inputs: torch.Tensor) -> Any:
    """Run a program in a process that cannot import us, from another folder."""
    given, result = folder / "given.pt", folder / "result.pt"
    torch.save(inputs, given)
    command = [sys.executable, "-c", _ALONE, *map(str, (file, given, result))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


@pytest.mark.parametrize(
    ("front_end", "mode"),
    [
        ("fx", "exact"),
        ("fx", "sharing"),
        ("fx", "pivoted"),
        ("export", "sharing"),
        ("modules", "sharing"),
    ],
)
def test_the_program_computes_what_the_model_does(
    front_end: str, mode: str, tmp_path: Path
) -> None:
    gm = build.toy(mode, front_end)
    example = build.ids(2, 7) if front_end == "modules" else None
    done = fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=example)
    assert (done.batch_varies, done.sequence_varies) == (True, True)
    assert done.inputs == ("idx",)
    x = build.ids()
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert worst(gm(x), loaded(idx=x)).relative <= tolerance(torch.float32, DEPTH)
    # every tensor is stored once: the shared basis, tied weights, slices that are views of one
    tensors = {id(t): t.nbytes for t in (*gm.parameters(), *gm.buffers())}
    assert sum(tensors.values()) <= _weights(tmp_path / "m.pt2") <= sum(tensors.values()) + 64


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_transformers(family: str, tmp_path: Path) -> None:
    gm = build.compiled_transformers(family, build.transformers_model(family))
    done = fxshare.export(gm, tmp_path / "m.pt2", to="pt2")
    assert done.inputs == ("input_ids", "attention_mask")
    x = build.ids()
    mask = torch.ones_like(x)
    mask[2, -3:] = 0
    expected = gm(input_ids=x, attention_mask=mask)
    inputs = {"input_ids": x, "attention_mask": mask}
    if family == "gpt2":
        found = run_alone(tmp_path / "m.pt2", tmp_path, **inputs)
    else:
        found = torch.export.load(tmp_path / "m.pt2").module()(**inputs)
    assert set(found) == {"logits"}
    assert type(found) is dict
    limit = tolerance(torch.float32, DEPTH)
    assert worst(expected.logits, found["logits"]).relative <= limit
    unmasked = gm(input_ids=x).logits
    assert worst(unmasked, found["logits"]).relative > limit  # the mask is no constant


def _weights(file: Path) -> int:
    """Bytes of the tensors in an archive."""
    with zipfile.ZipFile(file) as archive:
        return sum(
            entry.file_size
            for entry in archive.infolist()
            if "/weights/" in entry.filename or "/constants/" in entry.filename
            if not entry.filename.endswith(".json")
        )


def test_the_range_of_a_guard_travels_and_nothing_of_this_machine(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    fxshare.export(gm, tmp_path / "m.pt2", to="pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for trace in (b"stack_trace", b"nn_module_stack", str(tmp_path).encode(), b"fxshare", b".py"):
        assert trace not in content, trace
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    loaded(idx=build.ids(1, 16))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        loaded(idx=build.ids(1, 17))  # the model asserts at most 16


def test_static_shapes(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    x = build.ids(2, 5)
    done = fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=x, dynamic=False)
    assert (done.batch_varies, done.sequence_varies) == (False, False)
    assert done.checked == ("idx 2×5",)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert worst(gm(x), loaded(idx=x)).relative <= tolerance(torch.float32, DEPTH)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        loaded(idx=build.ids(2, 6))
