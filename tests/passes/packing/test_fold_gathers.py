"""FoldGathers: the gather moves into the rows of the linears before an elementwise function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxshare.capture.tracing.align import TrainingSwitch
from fxshare.factors.pivots import pivot
from passes import (
    FoldGathers,
    PivotBasis,
    PivotedGroup,
    Rows,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    SplitSite,
    equal_outputs,
    origins,
    run,
    slice_weight,
    slices,
)
from passes.graph.origins import Origin
from passes.graph.slices import gather_order, set_slices
from passes.sharing.pivot_basis import gathers
from tests.passes.build import exact_factors
from tests.passes.build import pivoted as pivoted_group


class Gated(nn.Module):
    """``down(silu(gate x) ⊙ up x)``; with ``peek`` the hidden units are read once more."""

    def __init__(self, *, peek: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 10), nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.act, self.peek = nn.SiLU(), peek
        self.norm = nn.LayerNorm(10) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.act(self.gate(x)) * self.up(x))
        y = self.down(hidden)
        return y + hidden.sum(-1, keepdim=True) if self.peek else y


class Switches(fx.Tracer):
    """A tracer that keeps training switches as calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TrainingSwitch) or super().is_leaf_module(m, module_qualified_name)


class Between(Gated):
    """``down`` of what ``made`` computes from the model, the gate's output, the up's and ``x``."""

    def __init__(self, made: Callable[[Between, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made
        self.in_place, self.mul = nn.ReLU(inplace=True), nn.Parameter(torch.randn(10))
        self.other, self.switch = nn.Linear(6, 10), TrainingSwitch(0.5, 2.0)
        self.register_buffer("order", torch.arange(9, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.made(self, self.gate(x), self.up(x), x))


def pivoted(
    model: nn.Module, rank: int = 4, names: Sequence[str] = ("gate", "up", "down"), cut: int = 0
) -> fx.GraphModule:
    """The model with the linears ``names`` slices (of which the first may be ``cut`` in two) and
    ``down`` stored pivoted at ``rank``."""
    gm = fx.GraphModule(model.double(), Switches().trace(model))
    sites = []
    for name in names:
        end = gm.get_submodule(name).out_features
        rows = (Rows(name, 0, end),)
        if cut and name == names[0]:
            rows = (Rows(f"{name}.a", 0, cut), Rows(f"{name}.b", cut, end))
        sites.append(SplitSite((name,), rows))
    weight = gm.get_submodule("down").weight.detach()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    basis, coefficient = vh[:rank], u[:, :rank] * s[:rank]
    made = pivot(basis)
    result, _ = run(
        gm,
        [
            SplitLinear(sites=tuple(sites)),
            ShareBasis(groups=(SharedGroup("basis_down", basis, {"down": coefficient}),)),
            PivotBasis(
                groups=(
                    PivotedGroup(
                        "basis_down",
                        made.kept_J,
                        made.table_RT,
                        {"down": coefficient @ made.block_RR},
                    ),
                )
            ),
        ],
    )
    return result


def test_the_gather_is_gone_and_the_function_stays() -> None:
    before = pivoted(Gated())
    after, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == 1
    assert "index_select" in before.code
    assert "index_select" not in after.code
    x = torch.randn(3, 6, dtype=torch.float64)
    assert equal_outputs(before, after, [x], tolerance=1e-14)


def test_weights_are_told_in_their_original_order() -> None:
    model = Gated().double()
    after, _ = run(pivoted(model), [FoldGathers()])
    assert torch.equal(slice_weight(after, "gate"), model.gate.weight)
    assert torch.equal(slice_weight(after, "up"), model.up.weight)
    assert not torch.equal(after.get_submodule("up").weight, model.up.weight)
    before = pivoted(model)
    assert torch.allclose(slice_weight(after, "down"), slice_weight(before, "down"), atol=1e-14)


def test_a_second_run_finds_nothing() -> None:
    once, _ = run(pivoted(Gated()), [FoldGathers()])
    _, (applied,) = run(once, [FoldGathers()])
    assert applied.rewrites == 0


@pytest.mark.parametrize("options", [{"peek": True}, {"norm": True}])
def test_activations_with_other_readers_or_mixing_between_are_left_alone(
    options: dict[str, bool],
) -> None:
    gm = pivoted(Gated(**options))
    after, (applied,) = run(gm, [FoldGathers()])
    assert applied.rewrites == 0
    assert after.code == gm.code


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda m, g, u, x: torch.softmax(g, -1) * u, id="function"),
        pytest.param(lambda m, g, u, x: g.cumsum(-1) * u, id="method"),
        pytest.param(lambda m, g, u, x: m.in_place(g) * u, id="in place"),
        pytest.param(lambda m, g, u, x: torch.mul(g, u, out=g), id="out="),
        pytest.param(lambda m, g, u, x: g * u * m.mul, id="parameter"),
        pytest.param(lambda m, g, u, x: g * u + x.sum(-1, keepdim=True), id="input"),
        pytest.param(lambda m, g, u, x: g * m.other(x), id="linear that is no slice"),
        pytest.param(lambda m, g, u, x: g * u + g[..., :1], id="read between"),
    ],
)
def test_what_is_not_made_one_by_one_from_whole_slices_is_left_alone(made: Any) -> None:
    """Each of the reasons alone: all else is as where the gather is folded."""
    gm = pivoted(Between(made))
    after, (applied,) = run(gm, [FoldGathers()])
    assert applied.rewrites == 0
    assert after.code == gm.code


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda m, g, u, x: m.act(g) * u, id="module"),
        pytest.param(lambda m, g, u, x: torch.add(nn.functional.gelu(g), 2 * u), id="function"),
        pytest.param(lambda m, g, u, x: g.relu().mul(u), id="method"),
        pytest.param(lambda m, g, u, x: (g * g) * (g + u), id="read twice on the way"),
        pytest.param(lambda m, g, u, x: g * m.switch(), id="training switch"),
        pytest.param(lambda m, g, u, x: g, id="one producer"),
    ],
)
def test_what_is_made_one_by_one_is_folded_and_computes_the_same(made: Any) -> None:
    before = pivoted(Between(made))
    after, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == 1
    x = torch.randn(3, 6, dtype=torch.float64)
    assert equal_outputs(before, after, [x], tolerance=1e-13)
    assert not gathers(after)
    assert not [name for name, _ in after.named_buffers() if name.startswith("gather")]


def test_a_graph_without_values_is_folded_as_one_with_them() -> None:
    """A saved folder's graph is made on the meta device, where no order is known yet."""
    gm = pivoted(Gated())
    folded, _ = run(gm, [FoldGathers()])
    after, (applied,) = run(gm.to("meta"), [FoldGathers()])
    assert applied.rewrites == 1
    assert after.code == folded.code
    assert slices(after) == slices(folded)
    assert after.get_submodule("up").weight.is_meta


def test_a_producer_of_two_slices_is_left_alone() -> None:
    _, (applied,) = run(pivoted(Gated(), cut=4), [FoldGathers()])
    assert applied.rewrites == 0


def test_a_producer_whose_rows_are_in_another_order_already_is_left_alone() -> None:
    gm = pivoted(Gated())
    set_slices(gm, {"up": replace(slices(gm)["up"], folded="basis_down")})
    _, (applied,) = run(gm, [FoldGathers()])
    assert applied.rewrites == 0


def test_the_folded_linears_stay_what_they_were() -> None:
    """Bias or none, training mode, what is trained, buffers, and the places of their rows."""
    model = Gated()
    model.gate = nn.Linear(6, 10, bias=False)
    before = pivoted(model)
    before.get_submodule("gate").weight.requires_grad_(False)
    before.get_submodule("up").register_buffer("scale", torch.arange(3.0))
    for mode in (True, False):
        after, (applied,) = run(before.train(mode), [FoldGathers()])
        assert applied.rewrites == 1
        gate, up = after.get_submodule("gate"), after.get_submodule("up")
        assert gate.bias is None
        assert not gate.weight.requires_grad
        assert up.weight.requires_grad
        assert gate.training is up.training is mode
        assert torch.equal(up.get_buffer("scale"), torch.arange(3.0))
        order = gather_order(after, "basis_down")
        assert order is not None
        assert torch.equal(up.bias, before.get_submodule("up").bias[order])
        assert origins(after)["gate"] == Origin("gate", 0, 10, "basis_down")
        assert slices(after)["up"].folded == "basis_down"
        assert slices(after)["down"].folded is None


@pytest.mark.parametrize("node", ["a node each", "one node"])
@pytest.mark.parametrize("peek", [False, True])
def test_layers_on_one_basis_share_an_index_that_goes_with_its_last_reader(
    peek: bool, node: str
) -> None:
    """Two layers read one pivoted basis; ``peek`` keeps the second one's gather, and so the index,
    its record and its values."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(6, 10), nn.Linear(6, 10)
            self.down = nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(torch.relu(self.gate(x)))
            hidden = torch.tanh(self.up(y))
            z = self.down(hidden)
            return z + hidden.sum(-1, keepdim=True) if peek else z

    before = pivoted(Twice())
    if node == "one node":
        first, second = (n for n in before.graph.nodes if n.target == "gather_0")
        second.replace_all_uses_with(first)
        before.graph.erase_node(second)
        before.recompile()
    after, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == (1 if peek else 2)
    assert dict(gathers(after)) == ({"gather_0": ("basis_down",)} if peek else {})
    assert hasattr(after, "gather_0") is peek
    x = torch.randn(3, 6, dtype=torch.float64)
    assert equal_outputs(before, after, [x], tolerance=1e-13)


@pytest.mark.parametrize("reason", ["mixed", "read twice"])
@pytest.mark.parametrize("first", [False, True])
def test_what_is_left_alone_stops_nothing_before_or_after_it(reason: str, first: bool) -> None:
    """One gather is folded; another, earlier or later in the graph, is not and stays recorded."""

    class Both(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.side = nn.Linear(6, 8), nn.Linear(8, 6)

        def alone(self, x: Tensor) -> Tensor:
            hidden = self.pre(x)
            if reason == "mixed":
                return self.side(hidden.softmax(-1))
            return self.side(hidden) + hidden.sum(-1, keepdim=True)

        def forward(self, x: Tensor) -> Tensor:
            if first:
                return super().forward(self.alone(x))
            return self.alone(super().forward(x))

    gm = fx.symbolic_trace(Both().double())
    names = ("gate", "up", "pre", "down", "side")
    one = [SplitSite((n,), (Rows(n, 0, gm.get_submodule(n).out_features),)) for n in names]
    shared = [exact_factors({n: gm.get_submodule(n).weight}, f"basis_{n}") for n in names[3:]]
    steps = [
        SplitLinear(sites=tuple(one)),
        ShareBasis(groups=tuple(shared)),
        PivotBasis(groups=tuple(pivoted_group(g) for g in shared)),
    ]
    before, _ = run(gm, steps)
    after, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == 1
    assert list(gathers(after).values()) == [("basis_side",)]
    x = torch.randn(3, 6, dtype=torch.float64)
    assert equal_outputs(before, after, [x], tolerance=1e-12)


def test_a_gather_for_two_bases_is_left_alone() -> None:
    """Each of the bases keeps other inputs: the rows cannot be in both orders."""

    class Two(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.gate(x)) * self.up(x)
            return self.down(hidden) + self.side(hidden)

    gm = fx.symbolic_trace(Two().double())
    names = ("gate", "up", "down", "side")
    one = [SplitSite((n,), (Rows(n, 0, gm.get_submodule(n).out_features),)) for n in names]
    shared = [exact_factors({n: gm.get_submodule(n).weight}, f"basis_{n}") for n in names[2:]]
    before, _ = run(
        gm,
        [
            SplitLinear(sites=tuple(one)),
            ShareBasis(groups=tuple(shared)),
            PivotBasis(groups=tuple(pivoted_group(g) for g in shared)),
        ],
    )
    assert [len(bases) for bases in gathers(before).values()] == [2]
    _, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == 0


def test_an_index_select_of_the_model_is_left_alone() -> None:
    class Selects(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.index_select(x, -1, index=self.order[4:]))

    gm = pivoted(Selects(lambda m, g, u, x: torch.index_select(g * u, -1, m.order)))
    after, (applied,) = run(gm, [FoldGathers()])
    assert applied.rewrites == 0
    assert after.code == gm.code


def test_a_producer_called_twice_is_left_alone() -> None:
    class Twice(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.gate(x).sum(-1, keepdim=True)

    _, (applied,) = run(pivoted(Twice()), [FoldGathers()])
    assert applied.rewrites == 0


def test_reordering_only_one_of_two_producers_is_caught() -> None:
    """The check that would miss a wrong fold proves nothing: here it is done wrong on purpose."""
    before = pivoted(Gated())
    after, _ = run(before, [FoldGathers()])
    up = after.get_submodule("up")
    up.weight = nn.Parameter(slice_weight(after, "up").detach().clone())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not equal_outputs(before, after, [x], tolerance=1e-3)
