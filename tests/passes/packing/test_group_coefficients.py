"""Coefficients of heads that have a basis each, as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from passes import (
    GroupCoefficients,
    Pass,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    StackBases,
    equal_outputs,
    forget_origins,
    lowering_passes,
    original,
    origins,
    run,
    slice_weight,
    slices,
)
from passes.graph.slices import basis_of, rows_of
from tests.passes.build import site_of, x_of

EXACT = 1e-12
HEADS = 6


class Fused(nn.Module):
    """A fused projection whose q, k and v are used apart, called once or twice."""

    def __init__(self, *, bias: bool = True, twice: bool = False, height: int = 12) -> None:
        super().__init__()
        self.attn = nn.Linear(6, height, bias=bias)
        self.twice = twice
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 6) to (..., out / 3)."""
        q, k, v = self.attn(x).chunk(3, -1)
        if self.twice:
            more = self.attn(torch.tanh(x)).chunk(3, -1)
            q, k, v = q + more[1], k, v * more[0]
        return torch.tanh(q * k) * v


def shared(
    model: nn.Module,
    ranks: Sequence[int] = (2,) * HEADS,
    heights: Sequence[int] = (2,) * HEADS,
    *,
    pooled: int = 1,
) -> fx.GraphModule:
    """A basis for each run of ``pooled`` heads, of random factors, which StackBases puts into one
    linear."""
    gm = fx.symbolic_trace(model)
    names = [(f".{at}", height) for at, height in enumerate(heights)]
    split, _ = run(gm, [SplitLinear(sites=(site_of(["attn"], names),))])
    generator = torch.Generator().manual_seed(1)

    def factor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    groups = []
    for number, rank in enumerate(ranks):
        heads = range(number * pooled, (number + 1) * pooled)
        coefficients = {f"attn.{at}": factor(heights[at], rank) for at in heads}
        groups.append(SharedGroup(f"basis_{number}", factor(rank, 6), coefficients))
    made, _ = run(split, [ShareBasis(groups=tuple(groups)), ReuseBasis(), StackBases()])
    forget_origins(made)
    return made


def count(gm: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def check_equal(source: fx.GraphModule, result: fx.GraphModule) -> None:
    """Outputs at two shapes, gradients, stored numbers, and what each slice stands for."""
    for x in (x_of(6), x_of(6)[0]):
        assert equal_outputs(source, result, [x], tolerance=EXACT)
    numbers = [sum(p.numel() for p in gm.parameters()) for gm in (source, result)]
    assert numbers[0] == numbers[1]
    gradients = []
    for gm in (source, result):
        x = x_of(6).requires_grad_()
        gm(x).square().sum().backward()
        gradients.append(x.grad)
        assert all(p.grad is not None for p in gm.parameters())
        gm.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    for name in slices(source):
        assert torch.equal(slice_weight(source, name), slice_weight(result, name))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("twice", [False, True])
def test_heads_with_a_basis_each_are_one_product(bias: bool, twice: bool) -> None:
    source = shared(Fused(bias=bias, twice=twice))
    text = str(source.graph)
    result, (applied,) = run(source, [GroupCoefficients()])
    assert applied.rewrites == 1 + twice
    assert str(source.graph) == text
    assert count(result, torch.einsum) == 1 + twice
    assert count(result, torch.cat) == count(result, torch.split) == 0
    assert set(result.state_dict()) == {
        *(["attn.bias"] if bias else []),
        "attn.weight",
        next(name for name in result.state_dict() if "basis" in name),
    }
    check_equal(source, result)
    again, (second,) = run(result, [GroupCoefficients()])
    assert second.rewrites == 0
    # the rows of each head are where the record says that they are
    for name, origin in origins(result).items():
        stored = result.get_submodule(origin.module).weight
        assert torch.equal(original(result, origin, stored), source.get_submodule(name).weight)
    for place in slices(again).values():
        weight = again.get_submodule(place.module).weight
        assert rows_of(again, place, weight).shape == (2, 2)
        assert basis_of(again, place).shape == (2, 6)


@pytest.mark.parametrize(
    ("ranks", "heights", "least", "products", "left"),
    [
        # a run ends where rank or height change, and what is left stays a linear
        ((2, 2, 2, 1, 1, 1), (2,) * 6, 2, 2, 0),
        ((2, 2, 1, 2, 2, 1), (2,) * 6, 2, 2, 2),
        ((2,) * 6, (2, 2, 2, 4, 4, 4), 2, 2, 0),
        ((1, 2, 1, 2, 1, 2), (2,) * 6, 2, 0, 6),
        # too few to gain by it
        ((2, 2, 2, 1, 1, 1), (2,) * 6, 6, 0, 6),
        ((2,) * 6, (2,) * 6, 7, 0, 6),
    ],
)
def test_what_goes_together(
    ranks: tuple[int, ...], heights: tuple[int, ...], least: int, products: int, left: int
) -> None:
    source = shared(Fused(height=sum(heights)), ranks, heights)
    result, (applied,) = run(source, [GroupCoefficients(least=least)])
    assert applied.rewrites == count(result, torch.einsum) == products
    assert sum(str(n.target).startswith("attn.") for n in _calls(result)) == left
    check_equal(source, result)
    if not products:
        assert str(result.graph) == str(source.graph)


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_module"]


def test_lowering_hands_the_parts_of_grouped_products_on() -> None:
    """Where a product ends with q, k or v, there is no cat between it and what reads that part."""
    heights = (2,) * 12
    ranks = (2,) * 8 + (1,) * 4
    source = shared(Fused(height=24), ranks, heights)
    passes = [one for one in lowering_passes() if not isinstance(one, GroupCoefficients)]
    at = [type(one) for one in lowering_passes()].index(GroupCoefficients)
    result, _ = run(source, [*passes[:at], GroupCoefficients(least=4), *passes[at:]])
    assert count(result, torch.einsum) == 2
    check_equal(source, result)
    # v ends where a product ends, q and k share one: the cat stays as their split needs the whole
    assert count(result, torch.cat) == 1
    even = shared(Fused(height=24), (2,) * 4 + (1,) * 4 + (2,) * 4, heights)
    result, _ = run(even, [*passes[:at], GroupCoefficients(least=4), *passes[at:]])
    assert count(result, torch.einsum) == 3
    assert count(result, torch.cat) == 0
    check_equal(even, result)


@pytest.mark.parametrize("pooled", [2, 3])
def test_heads_that_share_a_basis_stay_linears(pooled: int) -> None:
    """FuseCoefficients is for them; grouping would read one piece twice."""
    source = shared(Fused(), (2,) * (HEADS // pooled), pooled=pooled)
    result, (applied,) = run(source, [GroupCoefficients(least=2)])
    assert applied.rewrites == 0
    assert str(result.graph) == str(source.graph)


def _read_elsewhere(gm: fx.GraphModule) -> None:
    node = next(n for n in _calls(gm) if str(n.target).startswith("attn."))
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        more = gm.graph.call_function(torch.sum, (node,))
        total = gm.graph.call_function(torch.add, (output.args[0], more))
    output.args = (total,)


def _written(gm: fx.GraphModule) -> None:
    node = next(n for n in _calls(gm) if str(n.target).startswith("attn."))
    (piece,) = node.all_input_nodes
    with gm.graph.inserting_before(node):
        node.update_arg(0, gm.graph.call_method("mul_", (piece, 2.0)))


@pytest.mark.parametrize(("change", "count"), [(_read_elsewhere, 1), (_written, 0)])
def test_what_something_else_touches_stays(
    change: Callable[[fx.GraphModule], None], count: int
) -> None:
    source = shared(Fused())
    change(source)
    source.recompile()
    result, (applied,) = run(source, [GroupCoefficients(least=2)])
    assert applied.rewrites == count
    assert sum(str(n.target).startswith("attn.") for n in _calls(result)) == (1 if count else 6)
    for x in (x_of(6), x_of(6)[0]):
        assert equal_outputs(source, result, [x], tolerance=EXACT)


@dataclass(frozen=True)
class GroupsOther(Pass):
    """Groups the right coefficients, and reads the pieces in another order."""

    name: ClassVar[str] = "groups-other"

    def rewrite(self, gm: fx.GraphModule) -> int:
        made = GroupCoefficients().rewrite(gm)
        for node in gm.graph.nodes:
            if node.target is torch.einsum:
                with gm.graph.inserting_before(node):
                    node.update_arg(1, gm.graph.call_function(torch.flip, (node.args[1], (-2,))))
        return made


def test_a_wrong_grouping_is_seen() -> None:
    source = shared(Fused())
    result, _ = run(source, [GroupsOther()])
    assert not equal_outputs(source, result, [x_of(6)], tolerance=1e-3)
