"""Weights in few bits, handed to other runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxshare
from fxshare.base.quantised import BITS, Quantised
from fxshare.errors import ExportError
from fxshare.exporting.codes import with_plain_tensors
from tests.compiling.test_bits import outputs, pair


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_modules_of_plain_tensors_compute_the_same(front_end: str, bits: int) -> None:
    _, gm = pair("gpt2", bits, front_end)
    plain = with_plain_tensors(fxshare.lower(gm))
    assert not any(isinstance(p, Quantised) for p in plain.parameters())
    torch.testing.assert_close(outputs(plain), outputs(gm), rtol=1e-5, atol=1e-5)
    assert any(isinstance(p, Quantised) for p in gm.parameters())  # which stays as it is


@pytest.mark.parametrize("bits", BITS)
def test_a_program_of_torch_export_holds_the_codes(bits: int, tmp_path: Path) -> None:
    _, gm = pair("gpt2", bits)
    fxshare.export(fxshare.lower(gm), tmp_path / "model.pt2", to="pt2")
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    codes = [t for t in state.values() if t.dtype in (torch.int8, torch.uint8)]
    stored = [p for p in fxshare.lower(gm).parameters() if isinstance(p, Quantised)]
    assert sum(t.nbytes for t in codes) == sum(p.stored.nbytes for p in stored)


def test_an_onnx_file_holds_the_codes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, gm = pair("gpt2", 8)
    fxshare.export(gm, tmp_path / "model.onnx", to="onnx")
    found = onnx.load(tmp_path / "model.onnx").graph.initializer
    codes = [one for one in found if one.data_type == onnx.TensorProto.INT8]
    stored = [p for p in gm.parameters() if isinstance(p, Quantised)]
    assert sum(len(one.raw_data) for one in codes) == sum(p.stored.nbytes for p in stored)


@pytest.mark.parametrize("to", ["py", "vllm", "ort-genai"])
def test_what_has_no_form_for_codes_is_refused_with_the_way_out(to: str, tmp_path: Path) -> None:
    _, gm = pair("gpt2", 8)
    with pytest.raises(ExportError, match=f"{to} has no form for weights in few bits: export to"):
        fxshare.export(gm, tmp_path / "there", to=to)
    assert not (tmp_path / "there").exists()


def test_dense_weights_are_the_products_of_the_values(tmp_path: Path) -> None:
    _, gm = pair("gpt2", 4)
    made = fxshare.export(gm, tmp_path / "there", to="dense")
    assert made.distance is not None
    assert made.distance.relative <= made.limit


def test_four_bits_are_refused_where_the_file_would_hold_their_values(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, gm = pair("gpt2", 4)
    with pytest.raises(ExportError, match="has 4 bits, and the ONNX file would hold its values"):
        fxshare.export(gm, tmp_path / "model.onnx", to="onnx")
