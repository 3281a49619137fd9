"""``to="onnx"``: onnxruntime computes what the compiled model does, where the mask lets it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CheckFailed, ExportError
from tests.exporting import build

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
target = importlib.import_module("fxshare.exporting.targets.onnx")

DEPTH = 2 * 8 + 1
NAMES = ["m.onnx", "m.onnx.certificate.json", "m.onnx.data"]


def session(path: Path) -> Any:
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnxruntime_computes_what_the_model_does(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    done = fxshare.export(gm, tmp_path / "m.onnx", to="onnx")
    assert (done.batch_varies, done.sequence_varies) == (True, True)
    x = build.ids()
    loaded = session(tmp_path / "m.onnx")
    assert [i.name for i in loaded.get_inputs()] == ["idx"]
    (found,) = loaded.run(None, {"idx": x.numpy()})
    assert worst(gm(x), torch.from_numpy(found)).relative <= tolerance(torch.float32, DEPTH)
    # the shared basis is stored once, although two layers multiply with its transpose
    file = onnx.load(tmp_path / "m.onnx")
    tensors = {id(t): t.nbytes for t in (*gm.parameters(), *gm.buffers())}
    stored = sum(np.asarray(onnx.numpy_helper.to_array(t)).nbytes for t in file.graph.initializer)
    tied = gm.lm_head.weight.nbytes  # stored as the embedding and, transposed, as the head
    assert stored <= sum(tensors.values()) + tied + 1024
    assert {imported.version for imported in file.opset_import if not imported.domain} <= {18, 20}
    content = (tmp_path / "m.onnx").read_bytes()
    for trace in (b"stack_trace", b"fxshare", b"/site-packages/", str(tmp_path).encode()):
        assert trace not in content, trace


def test_a_masked_model_lowered(tmp_path: Path) -> None:
    gm = build.compiled_transformers("llama", build.transformers_model("llama"))
    done = fxshare.export(fxshare.lower(gm), tmp_path / "m.onnx", to="onnx", opset=20)
    assert done.inputs == ("input_ids", "attention_mask")
    x = build.ids()
    mask = torch.ones_like(x)
    mask[1, :4] = 0  # padded on the left: nothing to attend to there
    feed = {"input_ids": x.numpy(), "attention_mask": mask.numpy()}
    (found,) = session(tmp_path / "m.onnx").run(["logits"], feed)
    expected = gm(input_ids=x, attention_mask=mask).logits[mask.bool()]
    left = torch.from_numpy(found)[mask.bool()]
    assert worst(expected, left).relative <= tolerance(torch.float32, 2 * DEPTH)
    file = onnx.load(tmp_path / "m.onnx")
    assert {i.version for i in file.opset_import if not i.domain} == {20}


def test_large_weights_go_beside_the_file_and_a_damaged_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = build.compiled(build.model(n_layer=1), **build.SHARING)
    write = target.write

    def apart(subject: Any, path: Path, opset: int | None) -> Any:
        return write(subject, path, opset, largest_file=0)

    monkeypatch.setattr(target, "write", apart)
    fxshare.export(gm, tmp_path / "m.onnx", to="onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES
    session(tmp_path / "m.onnx")

    def damaged(path: Path, **options: Any) -> Any:
        file = onnx.load(path)
        bias = next(t for t in file.graph.initializer if t.name.endswith("c_fc.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[0] += 0.1
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return made(file.SerializeToString(), **options)

    made = runtime.InferenceSession
    monkeypatch.setattr(runtime, "InferenceSession", damaged)
    with pytest.raises(CheckFailed, match="onnx export of GPT differs"):
        fxshare.export(gm, tmp_path / "other.onnx", to="onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize("opset", [11, 999])
def test_an_opset_that_cannot_be_written(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"opset: expected 18 .* found {opset}"):
        fxshare.export(build.toy("sharing"), tmp_path / "m.onnx", to="onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=re.escape("pip install 'fxshare[onnx]'")):
        fxshare.export(build.toy("sharing"), tmp_path / "m.onnx", to="onnx")
