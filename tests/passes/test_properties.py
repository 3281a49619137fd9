"""Properties over random shapes: split and share at full rank is the identity, and its like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    FuseCoefficients,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    SplitSite,
    equal_outputs,
    run,
    slice_weight,
    slices,
)
from tests.passes.build import exact_factors, site_of

few = settings(max_examples=15, deadline=None)


@dataclass(frozen=True)
class Case:
    """A chain of layers and how their rows are cut; ``heights[l]`` are the slices of layer l."""

    width: int
    heights: tuple[tuple[int, ...], ...]
    bias: bool
    seed: int


class Stack(nn.Module):
    """``x ← tanh(x + mean over the outputs of the layer)``, for every layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(case.width, sum(rows), bias=case.bias) for rows in case.heights
        )
        generator = torch.Generator().manual_seed(case.seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            y = layer(x)
            x = torch.tanh(x + y.mean(-1, keepdim=True))
        return x, y


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
    return Case(
        width=draw(st.integers(1, 8)),
        heights=tuple(draw(st.lists(rows, min_size=1, max_size=4))),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def graph_of(case: Case) -> tuple[fx.GraphModule, tuple[SplitSite, ...], list[Tensor]]:
    gm = fx.symbolic_trace(Stack(case))
    wanted = tuple(
        site_of([f"layers.{i}"], [(f".s{j}", height) for j, height in enumerate(rows)])
        for i, rows in enumerate(case.heights)
    )
    generator = torch.Generator().manual_seed(case.seed + 1)
    return gm, wanted, [torch.randn(2, case.width, generator=generator, dtype=torch.float64)]


def one_group(gm: fx.GraphModule, rank: int | None = None) -> SharedGroup:
    group = exact_factors({name: slice_weight(gm, name) for name in slices(gm)}, "basis")
    if rank is None:
        return group
    cut = {name: c[:, :rank] for name, c in group.coefficients.items()}
    return SharedGroup("basis", group.basis_RI[:rank], cut)


@few
@given(cases())
def test_split_is_the_identity(case: Case) -> None:
    gm, wanted, x = graph_of(case)
    result, (applied, _) = run(gm, [SplitLinear(sites=wanted), CleanUp()])
    assert equal_outputs(gm, result, x, tolerance=1e-12)
    assert applied.rewrites == len(case.heights)  # .s0 is a new name even where it is all rows
    for i in range(len(case.heights)):
        rows = [slice_weight(result, name) for name in slices(result) if f"layers.{i}." in name]
        assert torch.equal(torch.cat(rows), gm.get_submodule(f"layers.{i}").weight)


@few
@given(cases(), st.booleans())
def test_split_then_share_at_full_rank_is_the_identity(case: Case, fuse: bool) -> None:
    gm, wanted, x = graph_of(case)
    first, _ = run(gm, [SplitLinear(sites=wanted)])
    rest = [ShareBasis(groups=(one_group(first),)), ReuseBasis()]
    result, _ = run(first, [*rest, *([FuseCoefficients()] if fuse else []), CleanUp()])
    assert equal_outputs(gm, result, x, tolerance=1e-10)
    assert sum("basis" in key for key in result.state_dict()) == 1


@few
@given(cases())
def test_fusing_undoes_splitting(case: Case) -> None:
    """With one basis for all, split ∘ share ∘ fuse has the modules that share alone has."""
    gm, wanted, x = graph_of(case)
    whole = tuple(site_of(s.calls, [("", s.rows[-1].stop)]) for s in wanted)
    apart, _ = run(gm, [SplitLinear(sites=wanted)])
    straight, _ = run(gm, [SplitLinear(sites=whole)])
    rest = [ReuseBasis(), FuseCoefficients(), CleanUp()]
    fused, _ = run(apart, [ShareBasis(groups=(one_group(apart),)), *rest])
    plain, _ = run(straight, [ShareBasis(groups=(one_group(straight),)), *rest])
    for i, rows in enumerate(case.heights):
        if len(rows) > 1:
            found = fused.get_submodule(f"layers.{i}")
            assert isinstance(found, nn.Linear)
            expected = plain.get_submodule(f"layers.{i}")
            torch.testing.assert_close(found.weight, expected.weight, rtol=0.0, atol=0.0)
    assert equal_outputs(plain, fused, x, tolerance=1e-12)
    assert not any(n.target is torch.cat for n in fused.graph.nodes)


@few
@given(cases(), st.data())
def test_at_any_rank_the_slices_are_the_product_and_fusing_changes_nothing(
    case: Case, data: st.DataObject
) -> None:
    gm, wanted, x = graph_of(case)
    first, _ = run(gm, [SplitLinear(sites=wanted)])
    rank = data.draw(st.integers(1, one_group(first).basis_RI.shape[0]))
    group = one_group(first, rank)
    shared, _ = run(first, [ShareBasis(groups=(group,))])
    fused, _ = run(shared, [ReuseBasis(), FuseCoefficients(), CleanUp()])
    for name, coefficient in group.coefficients.items():
        torch.testing.assert_close(
            slice_weight(fused, name), coefficient @ group.basis_RI, rtol=1e-12, atol=1e-12
        )
    assert equal_outputs(shared, fused, x, tolerance=1e-12)


@few
@given(cases())
def test_renaming_the_slices_changes_names_only(case: Case) -> None:
    gm, wanted, x = graph_of(case)
    other = tuple(
        site_of(s.calls, [(f".t_{r.start}", r.stop - r.start) for r in s.rows]) for s in wanted
    )
    left, _ = run(gm, [SplitLinear(sites=wanted)])
    right, _ = run(gm, [SplitLinear(sites=other)])
    assert [n.op for n in left.graph.nodes] == [n.op for n in right.graph.nodes]
    assert equal_outputs(left, right, x, tolerance=0.0)
