"""Pivoted storage end to end: the same function from fewer numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.factors.pivots import complement, pivot
from fxshare.result.products import dense_sites
from passes import derived_buffers
from passes.graph.graph import structure_copy
from tests.planning.models import MANY, batches, compiled, llama
from tests.toys import VOCABULARY

PIVOTED = {"storage": "pivoted", "search": "off"}
IDS = batches(1, rows=3, length=9, seed=5)[0]


def pivoted(dtype: torch.dtype = torch.float32, kept: float = 0.6, **keys: Any) -> tuple[Any, Any]:
    model = llama(dtype=dtype)
    return model, compiled(model, MANY, {"params_kept": kept}, PIVOTED, **keys)


def multiplied_out(model: nn.Module, gm: Any) -> nn.Module:
    """The model with the dense products of the factors as its weights."""
    copy = structure_copy(model)
    for name, weight in dense_sites(gm, gm.fxshare.plan).items():
        linear = copy.get_submodule(name)
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype))
    return copy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_pivoted_is_the_plain_product(dtype: torch.dtype, kept: float) -> None:
    model, gm = pivoted(dtype, kept)
    assert {g.storage for g in gm.fxshare.plan.groups} == {"pivoted"}
    with torch.no_grad():
        gap = worst(multiplied_out(model, gm)(IDS), gm(IDS))
        away = worst(model(IDS), gm(IDS))
    limit = 1e-10 if dtype == torch.float64 else tolerance(dtype, len(gm.fxshare.plan.sites))
    assert gap.relative <= limit
    assert away.relative > 100 * limit, "the plan loses something, or this compares nothing"
    assert fxshare.verify(model, gm).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pivoted_holds_in_half_precision(dtype: torch.dtype) -> None:
    model, gm = pivoted(dtype)
    with torch.no_grad():
        found = gm(IDS)
        gap = worst(multiplied_out(model, gm)(IDS), found)
    assert found.dtype == dtype
    assert gap.relative <= tolerance(dtype, len(gm.fxshare.plan.sites))
    assert fxshare.verify(model, gm).ok


def numbers_of(tensors: dict[str, Tensor], original: nn.Module, sites: list[str]) -> int:
    """Numbers beyond those of the parameters that no site has."""
    untouched = [
        p for n, p in original.named_parameters() if n.removesuffix(".weight") not in sites
    ]
    return sum(t.numel() for t in tensors.values()) - sum(p.numel() for p in untouched)


@pytest.mark.parametrize("kept", [0.35, 0.8])
def test_the_plans_numbers_are_those_that_are_stored(tmp_path: Path, kept: float) -> None:
    model, gm = pivoted(kept=kept)
    plan = gm.fxshare.plan
    sites = [site.name for site in plan.sites]
    state = {n: t for n, t in gm.state_dict().items() if n not in derived_buffers(gm)}
    assert numbers_of(state, model, sites) == plan.stored_numbers
    assert plan.stored_numbers <= kept * plan.dense_numbers
    fxshare.save(gm, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1
    with safe_open(files[0], "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert numbers_of(saved, model, sites) == plan.stored_numbers
    kinds = {t.dtype for t in saved.values()}
    assert kinds == {torch.float32, torch.int32}


def test_loading_gives_every_bit_back(tmp_path: Path) -> None:
    model, gm = pivoted()
    fxshare.save(gm, tmp_path / "out")
    loaded = fxshare.load(tmp_path / "out", model=llama)
    state = gm.state_dict()
    assert loaded.state_dict().keys() - derived_buffers(gm) == state.keys() - derived_buffers(gm)
    for name in state.keys() - derived_buffers(gm):
        assert torch.equal(loaded.state_dict()[name], state[name])
    for name in derived_buffers(gm):
        assert torch.equal(loaded.get_buffer(name), gm.get_buffer(name))
    with torch.no_grad():
        assert torch.equal(loaded(IDS), gm(IDS))
    assert fxshare.verify(model, loaded).ok


def test_gradients_flow_into_tables_and_coefficients() -> None:
    model, gm = pivoted(copy=True)
    logits = gm(IDS)
    logits.square().sum().backward()
    reference = multiplied_out(model, gm)
    reference(IDS).square().sum().backward()
    plan = gm.fxshare.plan
    bases = {group.name for group in plan.groups}
    assert bases
    for name in bases:
        basis = gm.get_submodule(name)
        assert not basis.kept.is_floating_point()
        assert float(basis.weight.grad.abs().sum()) > 0
    for name, parameter in gm.named_parameters():
        assert parameter.grad is not None, name
    # what is upstream of every basis gets the gradient of the plain product
    gap = worst(reference.embed.weight.grad, gm.embed.weight.grad)
    assert gap.relative <= tolerance(torch.float32, 4 * len(plan.sites))


def test_pivoted_stores_less_than_plain_at_one_rank() -> None:
    model = llama()
    budget = {"params_kept": 0.6}
    by_storage = {}
    for storage in ("plain", "pivoted"):
        gm = compiled(model, MANY, budget, {**PIVOTED, "storage": storage})
        by_storage[storage] = gm.fxshare.plan.outlook.predicted
    assert by_storage["pivoted"] < 0.9 * by_storage["plain"]
    assert IDS.max() < VOCABULARY


def test_columns_that_differ_in_their_last_digits_are_told_apart() -> None:
    """What is left of the others once the first column is taken off is small; the second column
    kept is still the larger one."""
    basis = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1e-9, 3e-9]], dtype=torch.float64)
    assert pivot(basis).kept_J.tolist() == [0, 2]


def test_exchanges_of_columns_are_counted_and_end_within_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    free, bound = pivot(basis, bound=1e9), pivot(basis, bound=1.01)
    assert free.swaps == 0
    assert 0 < bound.swaps < 160
    assert free.largest > 1.01 >= bound.largest
    for made in (free, bound):
        assert made.kept_J.tolist() == sorted(made.kept_J.tolist())
        rest = complement(made.kept_J, 40)
        gap = made.block_RR @ made.table_RT - basis[:, rest]
        assert float(gap.abs().max()) < 1e-12
