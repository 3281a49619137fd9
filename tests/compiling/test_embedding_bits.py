"""Embeddings and heads in few bits: one table of codes, whoever reads it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxshare
from fxshare.base.quantised import BITS, Quantised
from fxshare.calibration.calibrate import calibrate
from fxshare.capture import capture
from fxshare.errors import CheckFailed, ExportError
from fxshare.factors.metric import slice_statistics
from fxshare.factors.rounding import lost_by, nearest
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights
from fxshare.sites.visible import visible_sites
from fxshare.store.tensors import tensors_of
from fxshare.verifying.multiplied import multiplied_out
from tests.compiling.narrowed import batches, model
from tests.compiling.test_bits import outputs, stored_bytes
from tests.strategies import no_warnings_of_ours

FORMS = [("gpt2", 4), ("llama", 8), ("gpt2", 8), ("llama", 4)]
"""A table with two readers and one of positions, and an embedding and a head apart; with bits."""
every_form = pytest.mark.parametrize(("family", "bits"), FORMS)


def config(original: nn.Module, **budget: float) -> list[Any]:
    return [fxshare.propose(original).with_optional, {"budget": budget or {"params_kept": 1.0}}]


@functools.cache
def rounded(family: str, bits: int) -> tuple[nn.Module, Any]:
    """A model, and it with everything dense, in so many bits; tests must not change them."""
    original = model(family)
    cfg = [*config(original), {"planner": {"search": "off", "bits": [bits]}}]
    with no_warnings_of_ours():
        return original, fxshare.compile(original, cfg, calibration=batches())


class Tied(nn.Module):
    """The least that is exported in a moment: a table, and a head that is it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.head = nn.Linear(40, 50)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.embed(ids)))
        return y


@functools.cache
def tied(bits: int, kept: float = 1.0) -> tuple[nn.Module, Any, Tensor]:
    """Such a model and it in so many bits, as factors where less is kept; and ids."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = Tied().eval()
        ids = [torch.randint(50, (3, 8)) for _ in range(3)]
    types = {"table": {"pattern": "embed$", "embedding": True}}
    planner = {"search": "off", "bits": [bits]}
    cfg = {"weight_types": types, "budget": {"params_kept": kept}, "planner": planner}
    return original, fxshare.compile(original, cfg, calibration=ids), ids[0]


def tables(gm: Any) -> list[Quantised]:
    """The codes of what is looked up."""
    names = [site.slices[0].name for site in gm.fxshare.plan.sites if site.lookups]
    found = [gm.get_submodule(name).weight for name in names]
    assert found
    assert all(isinstance(weight, Quantised) for weight in found)
    return found


@every_form
def test_it_computes_what_its_codes_stand_for_and_tied_ones_are_stored_once(
    family: str, bits: int
) -> None:
    original, gm = rounded(family, bits)
    assert fxshare.verify(original, gm, batches()[:1]).ok
    torch.testing.assert_close(
        outputs(gm), outputs(multiplied_out(original, gm)), rtol=1e-5, atol=1e-5
    )
    assert (outputs(gm) - outputs(original)).abs().max() > 1e-4
    names = {site.name: site.readers for site in gm.fxshare.plan.sites if site.lookups}
    if family == "gpt2":
        assert set(names["transformer.wte"]) == {"transformer.wte", "lm_head"}
    else:
        head = [site for site in gm.fxshare.plan.sites if site.name == "lm_head"]
        assert names == {"model.embed_tokens": ("model.embed_tokens",)}
        assert isinstance(gm.get_submodule(head[0].slices[0].name).weight, Quantised)
    assert {weight.bits for weight in tables(gm)} == {bits}
    # every number of the model that is a matrix's has codes, once
    rows = gm.fxshare.report.groups
    assert {row.bits for row in rows} == {bits}
    assert sum(row.bytes_after for row in rows) == stored_bytes(gm)
    assert not [n for n, p in gm.named_parameters() if p.ndim == 2 and not isinstance(p, Quantised)]


@every_form
def test_saved_lowered_and_loaded_the_codes_are_the_same(
    family: str, bits: int, tmp_path: Path
) -> None:
    original, gm = rounded(family, bits)
    for number, one in enumerate((gm, fxshare.lower(gm, prefer="speed"))):
        torch.testing.assert_close(outputs(one), outputs(gm), rtol=1e-5, atol=1e-5)
        fxshare.save(one, tmp_path / str(number))
        back = fxshare.load(tmp_path / str(number))
        mine, theirs = tensors_of(one), tensors_of(back)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name][1], theirs[name][1]) for name in mine)
        assert torch.equal(outputs(back), outputs(one))
        assert stored_bytes(back) == stored_bytes(gm)
        assert fxshare.verify(original, back).ok


@every_form
def test_it_generates_what_the_multiplied_out_model_does(family: str, bits: int) -> None:
    original, gm = rounded(family, bits)
    ids = batches()[0][:2, :4]
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = multiplied_out(original, gm).generate(ids, **settings)
    for one in (gm, fxshare.lower(gm)):
        assert torch.equal(one.generate(ids, **settings), expected)
    # the model's own code
    assert torch.equal(gm.generate(ids, use_cache=False, **settings), expected)


@pytest.mark.parametrize("what", ["scale", "codes"])
def test_a_swapped_scale_and_wrong_codes_of_a_token_are_caught(what: str) -> None:
    original, gm = rounded("llama", 8)
    weight = tables(gm)[0]
    assert not torch.equal(weight.scale[3], weight.scale[4])
    part = weight.scale if what == "scale" else weight.stored
    before = part.clone()
    try:
        part[[3, 4]] = part[[4, 3]]
        with pytest.raises(CheckFailed, match="relative error of each slice's weight"):
            fxshare.verify(original, gm, strict=True)
    finally:
        part.copy_(before)
    assert fxshare.verify(original, gm).ok


class _Largest(TorchDispatchMode):
    """The most numbers that any floating-point result has."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_gathered_before_values_are_made(bits: int) -> None:
    table = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    weight = nearest(table, bits, torch.float32)
    ids = torch.tensor([[3, 499, 0], [7, 3, 3]])
    with _Largest() as seen:
        found = F.embedding(ids, weight, padding_idx=0)
    assert seen.found == ids.numel() * 40
    assert torch.equal(found, F.embedding(ids, weight.values()))
    with _Largest() as seen:
        weight.values()[ids]
    assert seen.found == weight.numel()


def test_compiled_it_computes_the_same() -> None:
    weight = nearest(torch.randn(50, 64), 4, torch.float32)
    ids = torch.tensor([[3, 49, 0]])
    compiled = torch.compile(
        lambda at: F.embedding(at, weight) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(ids), weight.values()[ids] * 2)


@pytest.mark.parametrize("bits", BITS)
def test_both_readers_price_a_tied_table(bits: int) -> None:
    """What rounding is said to lose, beside what it loses in the two readers' own metrics."""
    original = model("gpt2").double()
    cfg = fxshare.load_config(config(original))
    captured = capture(original, batches()[0])
    sites, _ = visible_sites(captured, match(original, cfg))
    found = calibrate(captured, batches(), sites, gradients=True)
    tied = next(site for site in sites if site.lookups and site.calls)
    weights = dense_weights(original, sites)
    one = slice_statistics(sites, weights, found)[tied.slices[0].name]
    gap = weights[tied.name] - nearest(weights[tied.name], bits, torch.float64).values()
    (lookup,) = found.lookups[tied.name].parts
    assert lookup.gradient is not None
    reads = lookup.share_V() * lookup.tokens / found.tokens
    embedding = 0.5 * float(reads @ ((gap @ lookup.gradient.gram()) * gap).sum(1))
    (inputs,) = found.inputs[tied.name]
    moment = found._moment(tied.slices[0].name, inputs.tokens)  # of a tied weight a diagonal
    head = 0.5 * float(moment @ ((gap @ inputs.gram()) * gap).sum(1))
    assert min(embedding, head) > 0.01 * max(embedding, head)
    assert lost_by(one, weights[tied.name] - gap) == pytest.approx(embedding + head, rel=0.15)


def test_a_budget_in_bytes_is_kept_with_embeddings_in_it() -> None:
    original = model("gpt2")
    size = sum(p.nbytes for p in original.parameters())
    planner = {"bits": [16, 8, 4], "search": "off"}
    cfg = [*config(original, max_bytes=size // 3), {"planner": planner}]
    with no_warnings_of_ours():
        gm = fxshare.compile(original, cfg, calibration=batches())
    assert any(site.lookups for site in gm.fxshare.plan.sites)
    tensors = {id(t): t for t in (*gm.parameters(), *gm.buffers())}.values()
    there = sum(t.stored_bytes if isinstance(t, Quantised) else t.nbytes for t in tensors)
    assert there <= size // 3
    assert fxshare.verify(original, gm).ok


@pytest.mark.parametrize("bits", BITS)
def test_factors_of_a_tied_table_in_few_bits(bits: int, tmp_path: Path) -> None:
    original, gm, ids = tied(bits, 0.6)
    (group,) = gm.fxshare.plan.groups
    assert (group.slices, group.bits) == (("embed",), bits)
    assert fxshare.verify(original, gm).ok
    fxshare.save(gm, tmp_path / "saved")
    assert torch.equal(fxshare.load(tmp_path / "saved", model=Tied())(ids), gm(ids))
    fast = fxshare.lower(gm, prefer="speed")
    torch.testing.assert_close(fast(ids), gm(ids), rtol=1e-5, atol=1e-5)
    assert stored_bytes(fast) == stored_bytes(gm)


def test_exported_programs_hold_the_codes_once(tmp_path: Path) -> None:
    _, gm, _ = tied(4)
    made = fxshare.export(gm, tmp_path / "model.pt2", to="pt2")
    assert made.distance is not None
    assert made.distance.relative <= made.limit
    state = torch.export.load(tmp_path / "model.pt2").state_dict
    (weight,) = tables(gm)
    shapes = sorted(tuple(t.shape) for t in state.values())
    assert shapes == sorted([(50,), tuple(weight.stored.shape), tuple(weight.scale.shape)])


@pytest.mark.parametrize("bits", BITS)
def test_onnx_files_have_one_table_for_embedding_and_head(bits: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    made = fxshare.export(tied(bits)[1], tmp_path / "model.onnx", to="onnx")
    assert made.distance is not None
    assert made.distance.relative <= made.limit
    graph = onnx.load(tmp_path / "model.onnx").graph
    of_rows = [one for one in graph.initializer if list(one.dims)[:1] == [50]]
    assert len(of_rows) == 3  # the bias, codes, and their scales
    codes = max(of_rows, key=lambda one: len(one.raw_data))
    assert len(codes.raw_data) == (50 * 40 if bits == 8 else 50 * 2 * 16)
    reads = [node.op_type for node in graph.node if codes.name in node.input]
    assert sorted(reads) == ["Gather", "MatMulNBits" if bits == 4 else "DequantizeLinear"]


def test_what_onnx_cannot_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match=r"of 4 bits is read otherwise .*--bits 16,8"):
        fxshare.export(tied(4, 0.6)[1], tmp_path / "model.onnx", to="onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_dense_weights_are_multiplied_out_with_the_reason(tmp_path: Path) -> None:
    _, gm = rounded("llama", 8)
    made = fxshare.export(gm, tmp_path / "there", to="dense")
    reason = "multiplied out: rows of 'model.embed_tokens' are looked up"
    assert any(reason in note for note in made.notes)
