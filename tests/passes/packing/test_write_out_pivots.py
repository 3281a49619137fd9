"""Pivoted bases of low rank, written out where several read one input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from passes import (
    FoldGathers,
    PivotBasis,
    PivotedGroup,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    StackBases,
    WriteOutPivots,
    equal_outputs,
    lowering_passes,
    run,
    slice_weight,
    slices,
)
from passes.graph.graph import linear_at
from tests.passes.build import Three, whole_sites, x_of

EXACT = 1e-12
WIDTH = 6


class Alone(nn.Module):
    """A linear that shares its input with none."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(WIDTH, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 6) to (..., 4)."""
        return self.only(x)


class Wired(nn.Module):
    """The input of the second linear is made element by element from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH).double()
        self.second = nn.Linear(WIDTH, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 6) to (..., 4)."""
        return self.second(torch.tanh(self.first(x)))


def pivoted(
    model: nn.Module, ranks: dict[str, int], *, fold: bool = False, train: bool = True
) -> fx.GraphModule:
    """A pivoted basis of that rank for each linear named, of random factors."""
    generator = torch.Generator().manual_seed(2)

    def factor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gm = fx.symbolic_trace(model.requires_grad_(train))
    plain, stored = [], []
    for name, rank in ranks.items():
        kept = torch.randperm(WIDTH, generator=generator)[:rank].sort().values
        coefficients = {name: factor(linear_at(gm, name).out_features, rank)}
        plain.append(
            SharedGroup(f"basis_{name.rpartition('.')[2]}", factor(rank, WIDTH), coefficients)
        )
        table = factor(rank, WIDTH - rank)
        stored.append(PivotedGroup(plain[-1].name, kept, table, coefficients))
    passes = [
        SplitLinear(sites=whole_sites(gm)),
        ShareBasis(groups=tuple(plain)),
        ReuseBasis(),
        PivotBasis(groups=tuple(stored)),
        *([FoldGathers()] if fold else []),
    ]
    return run(gm, passes)[0]


QKV = {"attn.q": 2, "attn.k": 3, "attn.v": 1}


@pytest.mark.parametrize("train", [True, False])
def test_bases_of_one_input_are_written_out(train: bool) -> None:
    source = pivoted(Three(), QKV, train=train)
    text = str(source.graph)
    result, (applied,) = run(source, [WriteOutPivots()])
    assert applied.rewrites == 3
    assert str(source.graph) == text
    assert not [name for name, _ in result.named_buffers()]
    assert not [n for n in result.graph.nodes if n.target is torch.index_select]
    for name, rank in QKV.items():
        place = slices(result)[name]
        assert not place.pivoted
        assert slices(source)[name].pivoted
        basis = linear_at(result, str(place.basis))
        assert basis.weight.shape == (rank, WIDTH)
        assert basis.weight.requires_grad is train
        assert basis.weight.is_contiguous()
        assert torch.equal(slice_weight(result, name), slice_weight(source, name))
    # the numbers of the kept blocks, and no more
    numbers = [sum(p.numel() for p in gm.parameters()) for gm in (source, result)]
    assert numbers[1] - numbers[0] == sum(rank**2 for rank in QKV.values())
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)
    stacked, (second, third) = run(result, [WriteOutPivots(), StackBases()])
    assert (second.rewrites, third.rewrites) == (0, 1)
    assert equal_outputs(source, stacked, [x_of(6)], tolerance=EXACT)


@pytest.mark.parametrize(("price", "count"), [(0, 0), (1, 2), (2, 3)])
def test_what_pays_is_written_out(price: int, count: int) -> None:
    """R² against 6 times the price, at ranks 2, 3 and 1."""
    source = pivoted(Three(), QKV)
    result, (applied,) = run(source, [WriteOutPivots(price=price)])
    assert applied.rewrites == count
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)
    if count == 2:  # the third still gathers, and nothing but its own pieces
        assert [b.numel() for n, b in result.named_buffers() if "gather" in n] == [WIDTH]
    if not count:
        assert str(result.graph) == str(source.graph)


def test_memory_leaves_bases_pivoted() -> None:
    source = pivoted(Three(), QKV)
    assert WriteOutPivots not in [type(one) for one in lowering_passes("memory")]
    result, _ = run(source, lowering_passes("memory"))
    assert all(place.pivoted for place in slices(result).values())


def test_a_basis_alone_stays_pivoted() -> None:
    source = pivoted(Alone(), {"only": 1})
    result, (applied,) = run(source, [WriteOutPivots()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(source.graph)


def test_a_folded_gather_costs_nothing_and_stays() -> None:
    source = pivoted(Wired(), {"second": 2}, fold=True)
    assert not [n for n in source.graph.nodes if n.target is torch.index_select]
    result, (applied,) = run(source, [WriteOutPivots(price=100)])
    assert applied.rewrites == 0
    assert str(result.graph) == str(source.graph)


def test_without_values_the_same_is_decided() -> None:
    source = pivoted(Three(), QKV)
    result, (applied,) = run(pivoted(Three(), QKV).to("meta"), [WriteOutPivots(price=1)])
    wanted, _ = run(source, [WriteOutPivots(price=1)])
    assert applied.rewrites == 2
    assert str(result.graph) == str(wanted.graph)
    shapes = {name: p.shape for name, p in wanted.named_parameters()}
    assert {name: p.shape for name, p in result.named_parameters()} == shapes


def test_another_order_of_inputs_is_told_apart() -> None:
    source = pivoted(Three(), QKV)
    result, _ = run(source, [WriteOutPivots()])
    basis = linear_at(result, str(slices(result)["attn.k"].basis))
    basis.weight = nn.Parameter(basis.weight.flip(1))
    assert not equal_outputs(source, result, [x_of(6)], tolerance=1e-3)
