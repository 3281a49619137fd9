"""FuseCoefficients: what is fused, under which name, who gets views, and what is left apart."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    FuseCoefficients,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    Slice,
    SplitLinear,
    SplitSite,
    equal_outputs,
    run,
    slice_weight,
    slices,
)
from tests.passes.build import (
    Three,
    exact_factors,
    shared_on_one_basis,
    site_of,
    split,
    whole_sites,
    x_of,
)


class Fused(nn.Module):
    """A fused projection whose output is used as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(6, 9)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c_attn(x))


PARTS = site_of(["c_attn"], [(".q", 4), (".k", 3), (".v", 2)])


def product_shared(
    gm: fx.GraphModule,
    wanted: Sequence[SplitSite],
    groups: Sequence[SharedGroup] | None = None,
) -> fx.GraphModule:
    """Split, shared on one basis where ``groups`` does not say otherwise, products reused."""
    first = split(gm, *wanted)
    factors = tuple(groups) if groups is not None else shared_on_one_basis(first)
    return run(first, [ShareBasis(groups=factors), ReuseBasis()])[0]


def fuse(gm: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    before = {name: slice_weight(gm, name) for name in slices(gm)}
    result, applied = run(gm, [FuseCoefficients(), CleanUp()])
    for name, weight in before.items():
        torch.testing.assert_close(slice_weight(result, name), weight, rtol=1e-12, atol=1e-12)
    return result, applied[0].rewrites


def targets(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op in ("call_module", "call_function")]


def test_a_whole_cat_goes_away() -> None:
    gm = fx.symbolic_trace(Fused())
    result, rewrites = fuse(product_shared(gm, [PARTS]))
    assert rewrites == 1
    assert targets(result) == ["basis", "c_attn", torch.tanh]
    assert slices(result) == {
        "c_attn.q": Slice("c_attn", 0, 4, "basis"),
        "c_attn.k": Slice("c_attn", 4, 7, "basis"),
        "c_attn.v": Slice("c_attn", 7, 9, "basis"),
    }
    assert set(result.state_dict()) == {"basis.weight", "c_attn.weight", "c_attn.bias"}
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


@pytest.mark.parametrize(
    ("alone", "left"), [("q", "k_v"), ("v", "q_k"), ("k", "q_v")], ids=["first", "last", "middle"]
)
def test_a_run_inside_a_cat_is_shortened_and_a_gap_gets_views(alone: str, left: str) -> None:
    gm = fx.symbolic_trace(Fused())
    first = split(gm, PARTS)
    weights = {name: slice_weight(first, name) for name in slices(first)}
    apart = {f"c_attn.{alone}": weights.pop(f"c_attn.{alone}")}
    factors = (exact_factors(weights, "basis"), exact_factors(apart, "other"))
    result, rewrites = fuse(product_shared(gm, [PARTS], factors))
    assert rewrites == 1
    (cat,) = (n for n in result.graph.nodes if n.target is torch.cat)
    names = [str(part.target) for part in cat.args[0]]
    if alone == "k":  # q and v are no neighbours: the cat takes their two views
        assert len(names) == 3
        assert torch.functional.split in targets(result)
    else:
        fused = f"c_attn.{left}"
        assert names == ([f"c_attn.{alone}", fused] if alone == "q" else [fused, "c_attn.v"])
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_separate_readers_get_views_of_one_product() -> None:
    gm = fx.symbolic_trace(Three())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    (cut,) = (n for n in result.graph.nodes if n.target is torch.functional.split)
    assert cut.args[1] == [4, 3, 2]
    q, k, v = result(x_of(6))
    assert q.data_ptr() != k.data_ptr()
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_one_that_is_read_beside_the_whole_gets_a_view_of_it() -> None:
    class Beside(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.attn.q(x), self.attn.k(x), self.attn.v(x)
            return torch.tanh(torch.cat([q, k, v], dim=-1)), torch.exp(k)

    gm = fx.symbolic_trace(Beside())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    assert torch.cat not in targets(result)
    (exp,) = (n for n in result.graph.nodes if n.target is torch.exp)
    assert exp.args[0].target is operator.getitem
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_coefficients_of_different_products_stay_apart() -> None:
    class Two(Three):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.attn.q(x), self.attn.k(x * 2), self.attn.v(x * 3)], dim=-1)

    gm = fx.symbolic_trace(Two())
    _, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 0


def test_a_cat_over_another_dimension_stays() -> None:
    class Rows(Three):
        def __init__(self) -> None:
            super().__init__(heights=(4, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.attn.q(x), self.attn.k(x), self.attn.v(x)], dim=1)

    gm = fx.symbolic_trace(Rows())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    assert torch.cat in targets(result)
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


@pytest.mark.parametrize(
    ("biases", "rewrites"), [((True, False, True), 0), ((False,) * 3, 1), ((True,) * 3, 1)]
)
def test_uneven_biases_are_not_fused(biases: Sequence[bool], rewrites: int) -> None:
    gm = fx.symbolic_trace(Three(biases=biases))
    result, found = fuse(product_shared(gm, whole_sites(gm)))
    assert found == rewrites
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_frozen_and_trainable_coefficients_are_not_fused() -> None:
    model = Three()
    model.attn.k.bias.requires_grad_(False)
    gm = fx.symbolic_trace(model)
    assert fuse(product_shared(gm, whole_sites(gm)))[1] == 0
    model.attn.requires_grad_(True)
    for projection in model.attn.children():
        projection.bias.requires_grad_(False)
    gm = fx.symbolic_trace(model)
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    assert {n: p.requires_grad for n, p in result.named_parameters()} == {
        "basis.weight": True,
        "attn.weight": True,
        "attn.bias": False,
    }


def test_a_coefficient_that_is_written_is_left_alone() -> None:
    """Autograd refuses to write into one of several views of a split."""

    class Scaled(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.attn.q(x).transpose(0, 1).mul_(0.5), self.attn.k(x), self.attn.v(x)

    gm = fx.symbolic_trace(Scaled())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 0
    sum(out.sum() for out in result(x_of(6))).backward()


def test_modules_that_are_called_twice_are_fused_once() -> None:
    class Twice(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (*super().forward(x), *super().forward(torch.tanh(x)))

    gm = fx.symbolic_trace(Twice())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 2
    assert targets(result).count("attn") == 2
    assert set(result.state_dict()) == {"basis.weight", "attn.weight", "attn.bias"}
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_a_module_with_other_neighbours_elsewhere_stays_apart() -> None:
    class Elsewhere(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = torch.tanh(x)
            return self.attn.q(x), self.attn.k(x), self.attn.k(y), self.attn.v(y)

    gm = fx.symbolic_trace(Elsewhere())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 0
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_one_reader_is_nothing_to_fuse() -> None:
    gm = fx.symbolic_trace(Fused())
    assert fuse(product_shared(gm, whole_sites(gm)))[1] == 0


# --- the fused name ------------------------------------------------------------------------------


def test_the_parent_s_name_where_it_holds_nothing_else() -> None:
    gm = fx.symbolic_trace(Three())
    assert "attn" in targets(fuse(product_shared(gm, whole_sites(gm)))[0])


@pytest.mark.parametrize("kind", ["parameter", "buffer", "module", "tensor below"])
def test_a_parent_that_holds_more_keeps_it(kind: str) -> None:
    class More(Three):
        def __init__(self) -> None:
            super().__init__()
            tensor = torch.full((4,), 2.0, dtype=torch.float64)
            if kind == "parameter":
                self.attn.scale = nn.Parameter(tensor)
            elif kind == "buffer":
                self.attn.register_buffer("scale", tensor)
            elif kind == "module":
                self.attn.act = nn.Tanh()
            else:
                self.attn.below = nn.Module()
                self.attn.below.scale = nn.Parameter(tensor)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            out = super().forward(x)
            if kind == "module":
                return self.attn.act(out[0]), *out[1:]
            scale = self.attn.below.scale if kind == "tensor below" else self.attn.scale
            return out[0] * scale, *out[1:]

    gm = fx.symbolic_trace(More())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    assert "attn.q_k_v" in targets(result)
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_a_name_that_is_taken() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 4)
            self.k = nn.Linear(6, 3)
            self.q_k = nn.Tanh()
            self.double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q_k(self.q(x)), self.k(x)

    gm = fx.symbolic_trace(Taken())
    result, rewrites = fuse(product_shared(gm, whole_sites(gm)))
    assert rewrites == 1
    assert isinstance(result.q_k, nn.Tanh)
    assert "q_k_" in targets(result)
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_many_parts_get_a_short_name() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6)
            self.out = nn.Linear(6, 6)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.out(torch.tanh(x))

    gm = fx.symbolic_trace(Heads())
    heads = site_of(["q"], [(f"_{i}", 1) for i in range(6)])
    result, _ = fuse(product_shared(gm, [heads, site_of(["out"], [("", 6)])]))
    assert "q_0_to_q_5" in targets(result)
    assert list(slices(result))[:2] == ["q_0", "q_1"]


def test_fusing_what_was_fused_with_a_new_neighbour() -> None:
    """A fused module of several slices may be fused again; its views are cut by module."""
    gm = fx.symbolic_trace(Three())
    result, _ = fuse(product_shared(gm, whole_sites(gm)))
    before = {name: slice_weight(result, name) for name in slices(result)}
    # what a pass of the user's own might add: one more coefficient of the same product
    z = next(n for n in result.graph.nodes if n.target == "basis")
    result.add_module("more", nn.Linear(result.basis.out_features, 5).double())
    with result.graph.inserting_after(z):
        more = result.graph.call_module("more", (z,))
    (output,) = (n for n in result.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], more),)
    result.meta["slices"] = {**slices(result), "more": Slice("more", 0, 5, "basis")}
    result.recompile()

    again, applied = run(result, [FuseCoefficients(), CleanUp()])
    assert applied[0].rewrites == 1
    assert equal_outputs(result, again, [x_of(6)], tolerance=1e-12)
    for name, weight in before.items():
        torch.testing.assert_close(slice_weight(again, name), weight)


def test_fusing_needs_split_sites_only() -> None:
    """Without sharing there are no coefficients: exact slices stay visible."""
    gm = fx.symbolic_trace(Fused())
    _, applied = run(gm, [SplitLinear(sites=(PARTS,)), FuseCoefficients()])
    assert [a.rewrites for a in applied] == [1, 0]
