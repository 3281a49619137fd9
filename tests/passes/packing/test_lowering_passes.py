"""The passes from the readable graph to the fast one, each by itself and in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    DropCats,
    FuseCoefficients,
    LayOut,
    Materialise,
    MergeGathers,
    MergeSlices,
    Pass,
    PivotBasis,
    ReuseBasis,
    ShareBasis,
    SplitLinear,
    StackBases,
    equal_outputs,
    forget_origins,
    lowering_passes,
    new_linear,
    original,
    origins,
    put_module,
    run,
    slice_weight,
    slices,
)
from passes.graph.graph import linear_at
from passes.graph.slices import set_slices
from passes.pipeline import Prefer
from tests.passes.build import (
    Cut,
    Three,
    captured,
    exact_factors,
    groups,
    inputs,
    pivoted,
    sites,
    whole_sites,
    x_of,
)
from tests.toys import GPT2, LLAMA, LLAMA_LIKE, NANOGPT, TOYS, Toy, same_tensors, tensors_of

EXACT = 1e-12
State = Literal["exact", "apart", "pooled", "pivoted"]
STATES: tuple[State, ...] = ("exact", "apart", "pooled", "pivoted")
_MADE: dict[tuple[str, State, str], fx.GraphModule] = {}


def rewritten(toy: Toy, state: State, mode: Literal["fx", "export"] = "fx") -> fx.GraphModule:
    """A readable graph of a toy: heads over the original weights, or on bases that each position
    in the layers has for itself, that are pooled, or that are pooled and pivoted."""
    key = (toy.name, state, mode)
    if key not in _MADE:
        gm = captured(toy, mode)
        cut: Cut = "parts" if state == "pivoted" else "heads"
        split, _ = run(gm, [SplitLinear(sites=sites(toy, gm, cut))])
        if state != "exact":
            shared = groups(split, state != "apart")
            extra: list[Pass] = [ShareBasis(groups=shared), ReuseBasis()]
            if state == "pivoted":
                extra.append(PivotBasis(groups=tuple(pivoted(group) for group in shared)))
            split, _ = run(split, extra)
        _MADE[key], _ = run(split, [CleanUp()])
    return _MADE[key]


# graphs of transformers' models are long, and say little that the others do not: one
PLACES = [
    pytest.param(toy, state, prefer, id=f"{toy.name}-{state}-{prefer}")
    for toy in TOYS
    for state in STATES
    for prefer in ("memory", "speed")
    if toy not in (GPT2, LLAMA)
]
PLACES.append(pytest.param(GPT2, "pooled", "memory", id="gpt2-pooled-memory"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # pivoting a square basis
@pytest.mark.parametrize(("toy", "state", "prefer"), PLACES)
def test_every_lowering_pass_keeps_its_contract(toy: Toy, state: State, prefer: Prefer) -> None:
    source = rewritten(toy, state)
    text, tensors = str(source.graph), tensors_of(source)
    weights = {name: slice_weight(source, name) for name in slices(source)}
    border = [(str(n.target), n.args) for n in source.graph.nodes if n.op == "placeholder"]
    numbers = sum(p.numel() for p in source.parameters())

    def check(one: Pass, gm: fx.GraphModule) -> None:
        gm.graph.lint()
        assert [(str(n.target), n.args) for n in gm.graph.nodes if n.op == "placeholder"] == border
        assert equal_outputs(source, gm, inputs(toy), tolerance=EXACT), one.name
        assert list(slices(gm)) == list(weights)
        for name, weight in weights.items():
            gap = (slice_weight(gm, name) - weight).abs().max()
            assert gap <= EXACT * weight.abs().max(), (one.name, name)
        if prefer == "memory":
            assert sum(p.numel() for p in gm.parameters()) <= numbers, one.name

    lowered, _ = run(source, lowering_passes(prefer), watch=check)

    assert str(source.graph) == text
    assert same_tensors(tensors_of(source), tensors)
    again, applied = run(lowered, lowering_passes(prefer))
    assert [a.name for a in applied if a.rewrites] == []
    assert list(again.state_dict()) == list(lowered.state_dict())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("state", ["exact", "apart", "pooled"])
@pytest.mark.parametrize("toy", [NANOGPT, LLAMA_LIKE], ids=lambda t: t.name)
def test_exported_graphs_lower_the_same(toy: Toy, state: State) -> None:
    source = rewritten(toy, state, "export")
    lowered, applied = run(source, lowering_passes())
    assert equal_outputs(source, lowered, inputs(toy), tolerance=EXACT)
    assert sum(a.rewrites for a in applied) > 0


@pytest.mark.parametrize("toy", [NANOGPT, GPT2], ids=["linear", "conv1d"])
def test_exact_heads_go_back_to_the_original_weight(toy: Toy) -> None:
    lowered, _ = run(rewritten(toy, "exact"), lowering_passes())
    assert not [n for n in lowered.graph.nodes if n.target is torch.cat]
    for name in toy.fused:
        before = captured(toy, "fx").get_submodule(name)  # the cache tells it from no mode
        merged = linear_at(lowered, name)
        assert merged.weight.data_ptr() == before.weight.data_ptr()
        assert merged.weight.untyped_storage().nbytes() == before.weight.nbytes
        assert merged.bias.data_ptr() == before.bias.data_ptr()


# One pass at a time ----------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """q, k, v side by side in two layers, put together and split again."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Three((4, 4, 4)).attn for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 6)`` to ``(…, 4)`` twice."""
        found = []
        for attn in self.h:
            q, k, v = attn.q(x), attn.k(x), attn.v(x)
            found.append(torch.tanh(q * k) * v)
            x = x + 1.0
        return found[0] + found[1]


def _shared(model: nn.Module, bases: dict[str, Sequence[str]]) -> fx.GraphModule:
    """Each basis for the slices named, exact, and products reused."""
    gm = fx.symbolic_trace(model)
    split, _ = run(gm, [SplitLinear(sites=whole_sites(gm))])
    made = [
        exact_factors({name: slice_weight(split, name) for name in names}, basis)
        for basis, names in bases.items()
    ]
    result, _ = run(split, [ShareBasis(groups=tuple(made)), ReuseBasis()])
    return result


def _layers(*pairs: str) -> list[str]:
    return [f"h.{pair}" for pair in pairs]


def test_bases_that_are_always_read_together_are_stacked() -> None:
    source = _shared(
        TwoLayers(),
        {"basis_q": _layers("0.q", "1.q"), "basis_kv": _layers("0.k", "0.v", "1.k", "1.v")},
    )
    result, (applied,) = run(source, [StackBases()])
    assert applied.rewrites == 2
    assert "basis_q_basis_kv" in dict(result.named_modules())
    assert sum(p.numel() for p in result.parameters()) == sum(
        p.numel() for p in source.parameters()
    )
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)


def test_a_basis_of_two_sets_is_stacked_only_where_it_may_be_stored_twice() -> None:
    source = _shared(
        TwoLayers(),
        {
            "basis_q": _layers("0.q", "1.q"),
            "basis_kv": _layers("0.k", "0.v"),
            "basis_k": _layers("1.k"),
            "basis_v": _layers("1.v"),
        },
    )
    kept, (applied,) = run(source, [StackBases()])
    assert applied.rewrites == 0

    start, _ = run(source, [])
    forget_origins(start)
    result, (applied,) = run(start, [StackBases(duplicate=True)])
    assert applied.rewrites == 2
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)
    numbers = [sum(p.numel() for p in gm.parameters()) for gm in (kept, result)]
    assert numbers[1] == numbers[0] + source.basis_q.weight.numel()
    place = origins(result)["basis_q"]
    assert len(place.copies) == 1
    for name, origin in origins(result).items():
        weight = linear_at(result, origin.module).weight
        assert torch.equal(original(result, origin, weight), linear_at(source, name).weight)


@pytest.mark.parametrize(("rank", "count"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_groups_are_multiplied_out_from_break_even_on(rank: int, count: int) -> None:
    """``R (I + O)`` against ``I O`` with I = 6 and O = 4: even at 2.4."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)

    source = _shared(One(), {"basis": ["q"]})
    weight = linear_at(source, "basis").weight
    with torch.no_grad():
        source.basis.weight = nn.Parameter(weight[:rank].clone())
        source.basis.out_features = rank
        source.q.weight = nn.Parameter(source.q.weight[:, :rank].clone())
        source.q.in_features = rank
    result, (applied,) = run(source, [Materialise()])
    assert applied.rewrites == count
    assert hasattr(result, "basis") == (count == 0)
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)
    gap = (slice_weight(result, "q") - slice_weight(source, "q")).abs().max()
    assert gap <= EXACT
    assert Materialise(margin=0.0).rewrite(run(source, [])[0]) == 0


def test_what_materialising_leaves_unread_is_gathered_no_more() -> None:
    gm = _shared(TwoLayers(), {"basis_q": _layers("0.q", "1.q"), "basis_k": _layers("0.k", "1.k")})
    shared = [
        exact_factors({n: slice_weight(gm, n) for n in _layers(f"0.{p}", f"1.{p}")}, f"basis_{p}")
        for p in "qk"
    ]
    # a rank of 3 for k: below break-even when pivoted, where that of q (6) is not
    thin = replace(
        shared[1],
        basis_RI=shared[1].basis_RI[:1],
        coefficients={n: c[:, :1] for n, c in shared[1].coefficients.items()},
    )
    split, _ = run(
        fx.symbolic_trace(TwoLayers()),
        [SplitLinear(sites=whole_sites(fx.symbolic_trace(TwoLayers())))],
    )
    factors = (shared[0], thin)
    source, _ = run(
        split,
        [
            ShareBasis(groups=factors),
            ReuseBasis(),
            PivotBasis(groups=tuple(pivoted(group) for group in factors)),
        ],
    )
    assert source.gather_0.numel() == 12
    result, (applied,) = run(source, [Materialise()])
    assert applied.rewrites == 2
    assert not hasattr(result, "basis_q")
    assert [b.numel() for n, b in result.named_buffers() if "gather" in n] == [6]
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)


class Joined(nn.Module):
    """Four linears, put together and split by a function of one's own."""

    def __init__(self, split: object, heights: Sequence[int] = (2, 2, 4, 4)) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, height) for height in heights)
        self.split = split
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """The product of the pieces."""
        assert callable(self.split)
        pieces = self.split(torch.cat([part(x) for part in self.parts], dim=-1))
        return pieces[0] * pieces[1] + pieces[2]


@pytest.mark.parametrize(
    ("split", "count"),
    [
        (lambda y: y.split(4, -1), 1),
        (lambda y: y.split((4, 4, 4), dim=-1), 1),
        (lambda y: y.chunk(3, -1), 1),
        (lambda y: torch.chunk(y, 3, dim=-1), 1),
        (lambda y: torch.split(y, [4, 4, 4], dim=-1), 1),
        (lambda y: y.view(3, 2, 12).split(4, -1), 1),
        # an untyped graph does not say that dimension 2 is the last one
        (lambda y: y.split(4, 2), 0),
        # that is another dimension
        (lambda y: [y.view(2, 12, 3).split(4, -2)[at].flatten(1) for at in range(3)], 0),
        # something reads the whole as well
        (lambda y: (y.split(4, -1)[0], y.split(4, -1)[1], y[..., :4]), 0),
        # written into: the parts would not be
        (lambda y: y.mul_(2.0).split(4, -1), 0),
    ],
)
def test_cats_that_are_split_again(split: object, count: int) -> None:
    source = fx.symbolic_trace(Joined(split))
    result, (applied,) = run(source, [DropCats()])
    assert applied.rewrites == count
    cats = [n for n in result.graph.nodes if n.target is torch.cat]
    assert len(cats) == 1  # of two parts, or the one that stayed
    assert len(cats[0].args[0]) == (2 if count else 4)
    assert equal_outputs(source, result, [x_of(6)], tolerance=EXACT)


def test_a_piece_that_ends_inside_a_part_keeps_the_cat() -> None:
    source = fx.symbolic_trace(Joined(lambda y: y.split(4, -1), (3, 3, 3, 3)))
    result, (applied,) = run(source, [DropCats()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(source.graph)


def test_factors_get_memory_of_their_own() -> None:
    source = _shared(TwoLayers(), {"basis_q": _layers("0.q", "1.q")})
    wide = torch.randn(6, 13, dtype=torch.float64)
    source.basis_q.weight = nn.Parameter(wide[:, 1:7])
    result, (applied,) = run(source, [LayOut()])
    weight = linear_at(result, "basis_q").weight
    assert applied.rewrites >= 1
    assert weight.is_contiguous()
    assert weight.data_ptr() % 64 == 0
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight, wide[:, 1:7])
    # what no basis has a part in is the caller's
    assert linear_at(result, "h.0.k").weight is linear_at(source, "h.0.k").weight


def test_a_factor_with_memory_of_its_own_gets_its_rows_in_order() -> None:
    source = _shared(TwoLayers(), {"basis_q": _layers("0.q", "1.q")})
    turned = torch.randn(6, 6, dtype=torch.float64).t()
    source.basis_q.weight = nn.Parameter(turned)
    result, _ = run(source, [LayOut()])
    weight = linear_at(result, "basis_q").weight
    assert weight.is_contiguous()
    assert torch.equal(weight, turned)
    again, (applied,) = run(result, [LayOut()])
    assert applied.rewrites == 0
    assert linear_at(again, "basis_q").weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tall_factors_lie_by_columns_where_those_are_read_faster(dtype: torch.dtype) -> None:
    source = _shared(TwoLayers(), {"basis_q": _layers("0.q", "1.q")}).to(dtype)
    tall, wide = torch.randn(4, 3, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    for name, weight in (("h.0.q", tall), ("h.1.q", tall.clone()), ("basis_q", wide)):
        put_module(source, name, new_linear(weight, None, requires_grad=True, training=False))
    result, _ = run(source, [LayOut()])
    weight = linear_at(result, "h.0.q").weight
    assert weight.stride() == ((1, 4) if dtype is torch.float32 else (3, 1))
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight, tall)
    assert linear_at(result, "basis_q").weight.stride() == (6, 1)
    again, (applied,) = run(result, [LayOut()])
    assert applied.rewrites == 0
    assert linear_at(again, "h.0.q").weight.stride() == weight.stride()


def test_dense_slices_that_are_called_elsewhere_stay_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Three((4, 3, 2)).attn

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.cat([self.attn.q(x), self.attn.k(x), self.attn.v(x)], dim=-1)
            return y, self.attn.k(torch.tanh(x))

    gm = fx.symbolic_trace(Both())
    source, _ = run(gm, [SplitLinear(sites=whole_sites(gm))])
    result, (applied,) = run(source, [MergeSlices()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(source.graph)


# Broken lowerings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergesTwoBases(Pass):
    """Lets the readers of one basis read another of the same shape."""

    name: ClassVar[str] = "merges-two-bases"

    def rewrite(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            if node.op == "call_module" and node.target == "basis_k":
                node.target = "basis_q"
        places = {n: p for n, p in slices(gm).items() if p.basis == "basis_k"}
        set_slices(gm, {n: replace(p, basis="basis_q") for n, p in places.items()})
        return 1


@dataclass(frozen=True)
class SwapsRows(Pass):
    """Stacks bases, and hands their products to the wrong readers."""

    name: ClassVar[str] = "swaps-rows"

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = StackBases().rewrite(gm)
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is torch.split:
                first, second, *_ = node.users
                first.args, second.args = second.args, first.args
        return count


@dataclass(frozen=True)
class DropsAReader(Pass):
    """Lets a reader of one product read the result of its neighbour."""

    name: ClassVar[str] = "drops-a-reader"

    def rewrite(self, gm: fx.GraphModule) -> int:
        q, k = (
            next(n for n in gm.graph.nodes if n.target == target) for target in ("h.0.q", "h.0.k")
        )
        k.replace_all_uses_with(q)
        gm.graph.erase_node(k)
        return 1


@pytest.mark.parametrize("broken", [MergesTwoBases(), SwapsRows(), DropsAReader()])
@pytest.mark.broken_graphs
def test_broken_lowerings_are_seen(broken: Pass) -> None:
    bases = {f"basis_{p}": _layers(f"0.{p}", f"1.{p}") for p in "qk"}
    source = _shared(TwoLayers(), bases)
    result, _ = run(source, [broken, DropCats(), MergeGathers(), FuseCoefficients(), CleanUp()])
    assert not equal_outputs(source, result, [x_of(6)], tolerance=1e-3)
