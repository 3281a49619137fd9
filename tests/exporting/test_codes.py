"""Weights in few bits, handed to other runtimes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxshare
from fxshare.base.quantised import BITS, Quantised
from fxshare.errors import ExportError
from fxshare.exporting.codes import _in_blocks, _owner, with_plain_tensors
from fxshare.factors.rounding import nearest
from passes.graph.lookups import look_up
from tests.compiling.test_bits import outputs, pair
from tests.exporting.test_packed import rounded


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
    fxshare.export(gm, tmp_path / "model.onnx", to="onnx", dynamic=False)
    found = onnx.load(tmp_path / "model.onnx").graph.initializer
    codes = [one for one in found if one.data_type == onnx.TensorProto.INT8]
    stored = [p for p in gm.parameters() if isinstance(p, Quantised)]
    assert sum(len(one.raw_data) for one in codes) == sum(p.stored.nbytes for p in stored)


@pytest.mark.parametrize("to", ["py", "vllm"])
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


@pytest.mark.parametrize("to", ["onnx", "ort-genai"])
def test_onnx_files_hold_four_bits_as_onnxruntime_multiplies_by_them(
    to: Any, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, gm = rounded((4,))
    made = fxshare.export(gm, tmp_path / "model.onnx", to=to)
    assert made.distance is not None
    assert made.distance.relative <= made.limit
    path = tmp_path / "model.onnx"
    graph = onnx.load(path / "model.onnx" if path.is_dir() else path).graph
    numbers = gm.fxshare.plan.dense_numbers
    by_name = {one.name: one for one in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 7
    codes = sum(len(by_name[node.input[1]].raw_data) for node in products)
    scales = sum(len(by_name[node.input[2]].raw_data) for node in products)
    assert (codes, scales) == (numbers // 2, numbers // 32 * 4)
    # a quarter of bfloat16, and a float32 for 32 numbers; nothing holds the values beside
    rest = sum(p.nbytes for p in gm.parameters() if not isinstance(p, Quantised))
    weights = sum(len(one.raw_data) for one in graph.initializer)
    assert weights < codes + scales + rest + 2_000


def test_blocks_are_filled_up_and_hold_the_codes_in_pairs() -> None:
    codes = torch.randint(-8, 8, (3, 40), dtype=torch.int8)
    blocks = _in_blocks(Quantised.of(codes, torch.ones(3, 2), 4, torch.float32))
    assert blocks.shape == (3, 2, 16)
    both = torch.stack([blocks & 15, blocks >> 4], -1).reshape(3, 64).to(torch.int8) - 8
    assert torch.equal(both[:, :40], codes)
    assert not both[:, 40:].any()


def test_four_bits_that_are_read_otherwise_are_refused_with_the_way_out() -> None:
    weight = Quantised.of(torch.ones(2, 4), torch.ones(2, 1), 4, torch.float32)
    linear = nn.Linear(4, 2, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    plain: Any = with_plain_tensors(nn.Sequential(linear), onnx=True)
    with pytest.raises(ExportError, match=r"2×4 of 4 bits is read otherwise .*--bits 16,8"):
        _ = plain[0].weight


@pytest.mark.parametrize("onnx", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_the_graph_itself_holds_is_looked_up_in_codes(tied: bool, onnx: bool) -> None:
    table, other = (
        nn.Parameter(nearest(torch.randn(50, 40), 4, torch.float32), requires_grad=False)
        for _ in range(2)
    )
    root = nn.Module()
    root.table, root.head = table, nn.Linear(40, 50)
    root.head.weight = table if tied else other
    graph = fx.Graph()
    rows = look_up(graph, graph.placeholder("ids"), "table", None)
    graph.output((rows, graph.call_module("head", (rows,))))
    gm, ids = fx.GraphModule(root, graph), torch.tensor([[3, 49, 0]])
    plain = with_plain_tensors(gm, onnx=onnx)
    assert not any(isinstance(p, Quantised) for p in plain.parameters())
    codes = {t.data_ptr() for t in plain.buffers() if t.dtype == torch.uint8}
    assert len(codes) == (1 if tied else 2)
    if not onnx:
        torch.testing.assert_close(plain(ids), gm(ids), rtol=1e-5, atol=1e-5)
    assert isinstance(gm.table, Quantised)


def test_a_module_for_rows_that_are_looked_up_takes_no_name_that_there_is() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    gm.add_module("a_wte_rows", nn.Identity())
    rows_VI = torch.ones(3, 2)
    lookup: Any = SimpleNamespace(name="a.wte", weight_VI=rows_VI)
    name = _owner(gm, lookup)
    assert type(gm.a_wte_rows) is nn.Identity
    assert torch.equal(gm.get_submodule(name).get_parameter("weight"), rows_VI)
