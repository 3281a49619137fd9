"""What is legal after each stage: legal graphs pass, and a broken one is told by node and rule."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from passes import (
    CleanUp,
    DialectError,
    FoldGathers,
    LookedUp,
    LookUpRows,
    Materialise,
    PivotBasis,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    StackBases,
    default_passes,
    equal_outputs,
    forget_origins,
    lowering_passes,
    new_linear,
    run,
    slice_weight,
    slices,
)
from passes.dialect import RULES, STAGES, Stage, check, findings, stage_of, watch
from passes.graph.modes import caller_modes, set_modes
from passes.graph.origins import origins
from passes.graph.slices import KeptUnits, Slice, set_slices
from passes.sharing.pivot_basis import PivotedGroup
from tests.passes.build import captured, groups, pivoted, site_of, sites, whole_sites, x_of
from tests.toys import TOYS, Toy
from tests.zoo.families import family
from tests.zoo.measure import SHARING, compiled

WIDTH = 6


class Model(nn.Module):
    """A fused projection, an embedding, and a linear on what another one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, WIDTH)
        self.attn = nn.Linear(WIDTH, 12)
        self.up = nn.Linear(12, WIDTH)
        self.down = nn.Linear(WIDTH, 4)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to (B, T, 4)."""
        return self.down(torch.tanh(self.up(torch.relu(self.attn(self.wte(ids))))))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _split() -> fx.GraphModule:
    gm = fx.symbolic_trace(Model())
    cut = [site_of(["attn"], [(f".{head}", 2) for head in range(6)])]
    cut += [site_of([name], [("", rows)]) for name, rows in (("up", WIDTH), ("down", 4))]
    looked_up = LookUpRows(sites=(LookedUp("wte", ("wte",)),))
    return run(gm, [looked_up, SplitLinear(sites=tuple(cut))])[0]


def _shared() -> fx.GraphModule:
    """A basis for each head, one for the embedding, and a pivoted one of rank 3 for ``down``."""
    made = [
        SharedGroup(f"basis_{head}", _random(2, WIDTH), {f"attn.{head}": _random(2, 2)})
        for head in range(6)
    ]
    made.append(SharedGroup("basis_wte", _random(3, WIDTH), {"wte": _random(5, 3)}))
    made.append(SharedGroup("basis_down", _random(3, WIDTH), {"down": _random(4, 3)}))
    stored = PivotedGroup("basis_down", torch.tensor([0, 2, 5]), _random(3, 3))
    stored = replace(stored, coefficients={"down": _random(4, 3)})
    passes = [ShareBasis(groups=tuple(made)), ReuseBasis(), PivotBasis(groups=(stored,))]
    return run(_split(), passes)[0]


def _lowered() -> fx.GraphModule:
    start = _shared()
    forget_origins(start)
    return run(start, lowering_passes())[0]


def _stacked() -> fx.GraphModule:
    start = _shared()
    forget_origins(start)
    return run(start, [StackBases()])[0]


MAKE: dict[str, Callable[[], fx.GraphModule]] = {
    "captured": lambda: fx.symbolic_trace(Model()),
    "split": _split,
    "shared": _shared,
    "folded": lambda: run(_shared(), [FoldGathers()])[0],
    "lowered": _lowered,
    "stacked": _stacked,
}


def node_of(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def _target(gm: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.target is target)


def _place(gm: fx.GraphModule, name: str, **changes: Any) -> None:
    set_slices(gm, {name: replace(slices(gm)[name], **changes)})


def _operation(gm: fx.GraphModule) -> None:
    node_of(gm, "relu").op = "call_magic"


def _modes_left(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(node_of(gm, "relu")):
        caller = gm.graph.call_function(caller_modes)
        gm.graph.call_function(set_modes, (caller, False))


def _moved_out(gm: fx.GraphModule) -> None:
    """``up`` reads under gradients what was computed without."""
    _modes_left(gm)
    with gm.graph.inserting_before(node_of(gm, "up")):
        gm.graph.call_function(set_modes, (node_of(gm, "caller_modes"),))


def _no_module(gm: fx.GraphModule) -> None:
    node_of(gm, "up").target = "nowhere.up"


def _no_tensor(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(node_of(gm, "relu")):
        gm.graph.create_node("get_attr", "up.scale", name="scale")


def _late_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(node_of(gm, "relu")):
        gm.graph.placeholder("late")


def _two_inputs(gm: fx.GraphModule) -> None:
    node_of(gm, "up").args = (node_of(gm, "relu"), node_of(gm, "attn"))


def _wrong_bias(gm: fx.GraphModule) -> None:
    gm.up.bias = nn.Parameter(_random(WIDTH - 1))


def _reversed(gm: fx.GraphModule) -> None:
    cat = node_of(gm, "cat")
    cat.args = (list(reversed(cat.args[0])),)  # type: ignore[arg-type]


def _one_missing(gm: fx.GraphModule) -> None:
    cat = node_of(gm, "cat")
    cat.args = (list(cat.args[0])[1:],)  # type: ignore[arg-type]


class Foreign(nn.Module):
    """Holds a weight and is no linear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _second_owner(gm: fx.GraphModule) -> None:
    gm.add_module("other", Foreign(torch.zeros(())))
    gm.other.weight = gm.basis_0.weight


def _biased_basis(gm: fx.GraphModule) -> None:
    gm.basis_1.bias = nn.Parameter(_random(2))


def _narrow_coefficient(gm: fx.GraphModule) -> None:
    weight = gm.get_submodule("attn.2").weight.detach()[:, :1]
    gm.attn.add_module("2", new_linear(weight, None, requires_grad=True, training=True))


def _other_reader(gm: fx.GraphModule) -> None:
    product = node_of(gm, "basis_3")
    with gm.graph.inserting_after(product):
        gm.graph.call_function(torch.tanh, (product,))


def _lookup_of_something_else(gm: fx.GraphModule) -> None:
    product = _target(gm, torch.matmul)
    product.args = (_target(gm, torch.nn.functional.embedding), product.args[1])
    product.target = torch.sub


def _kept(*numbers: int) -> Callable[[fx.GraphModule], None]:
    def breaks(gm: fx.GraphModule) -> None:
        gm.basis_down.kept = torch.tensor(numbers)

    return breaks


def _swapped_pieces(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is operator.getitem and node.args[0].target is torch.split:
            node.args = (node.args[0], 1 - node.args[1])


def _saved_index(gm: fx.GraphModule) -> None:
    gm.register_buffer("gather_0", gm.gather_0, persistent=True)


def _other_index(gm: fx.GraphModule) -> None:
    gm.register_buffer("gather_0", gm.gather_0.flip(0), persistent=False)


def _sizes(gm: fx.GraphModule) -> None:
    split = _target(gm, torch.split)
    sizes = list(split.args[1])  # type: ignore[arg-type]
    split.args = (split.args[0], [*sizes[:-1], sizes[-1] + 1])


def _forgotten_basis(gm: fx.GraphModule) -> None:
    _place(gm, "down", basis=None, pivoted=False)
    _place(gm, "up", folded="basis_gone")


def _exchanged(gm: fx.GraphModule) -> None:
    one, other = node_of(gm, "attn_0"), node_of(gm, "attn_1")
    one.args, other.args = other.args, one.args


def _left_over(gm: fx.GraphModule) -> None:
    gm.add_module("basis_4", nn.Linear(WIDTH, 2))


def _lost_origin(gm: fx.GraphModule) -> None:
    gm.meta["origins"] = {k: v for k, v in gm.meta["origins"].items() if k != "basis_4"}


def _far_origin(gm: fx.GraphModule) -> None:
    found = dict(gm.meta["origins"])
    found["basis_4"] = replace(found["basis_4"], start=90, stop=92)
    gm.meta["origins"] = found


def _other_batch(gm: fx.GraphModule) -> None:
    view = _target(gm, torch.einsum).args[1]
    assert isinstance(view, fx.Node)
    view.args = (*view.args[:2], (4, 3))


def _other_rows(gm: fx.GraphModule) -> None:
    _place(gm, "attn.5", basis_rows=(11, 13))


Break = Callable[[fx.GraphModule], None]
# the graph, its stage, what breaks it, the node (or name) and the rule that the error names
BROKEN: list[tuple[str, Stage, Break, str, str]] = [
    ("captured", "captured", _operation, "node 'relu'", "operation"),
    ("captured", "captured", _modes_left, "node 'output'", "modes"),
    ("captured", "captured", _moved_out, "node 'up'", "crossing"),
    ("captured", "captured", _no_module, "node 'up'", "target"),
    ("captured", "captured", _no_tensor, "node 'scale'", "target"),
    ("captured", "captured", _late_input, "node 'late'", "border"),
    ("captured", "captured", _two_inputs, "node 'up'", "linear-call"),
    ("captured", "captured", _wrong_bias, "node 'up'", "linear-call"),
    ("split", "captured", lambda gm: None, "slice 'wte' (node 'wte_weight')", "no-records"),
    ("split", "split", lambda g: _place(g, "up", stop=5), "(node 'up')", "slice-rows"),
    (
        "split",
        "split",
        lambda g: _place(g, "up", unit_rows=KeptUnits("units", 9, (0, 1, 2))),
        "slice 'up' (node 'up')",
        "hidden-units",
    ),
    (
        "split",
        "split",
        lambda g: _place(g, "up", module="x"),
        "slice 'up' (no node)",
        "slice-owner",
    ),
    ("split", "split", lambda g: _place(g, "up", folded="b"), "slice 'up' (node 'up')", "no-basis"),
    (
        "split",
        "split",
        lambda g: set_slices(g, {"other": Slice("up", 0, 3), "up": Slice("up", 3, 6)}),
        "slice 'other' (node 'up')",
        "own-linear",
    ),
    ("split", "split", _reversed, "node 'cat'", "rejoined"),
    ("split", "split", _one_missing, "node 'cat'", "rejoined"),
    (
        "split",
        "split",
        lambda g: g.add_module("up", Foreign(g.up.weight.detach())),
        "linear 'up' (node 'up')",
        "linear-module",
    ),
    ("shared", "split", lambda gm: None, "slice 'wte' (node 'wte_weight')", "no-basis"),
    ("shared", "shared", _second_owner, "basis 'basis_0' (node 'basis_0')", "basis-owner"),
    ("shared", "shared", _biased_basis, "basis 'basis_1' (node 'basis_1')", "basis-owner"),
    ("shared", "shared", _narrow_coefficient, "slice 'attn.2' (node 'attn_2')", "rank"),
    ("shared", "shared", _other_reader, "node 'tanh_1'", "basis-reader"),
    ("shared", "shared", _lookup_of_something_else, "node 'matmul'", "basis-lookup"),
    ("shared", "shared", _kept(2, 0, 5), "(node 'basis_down')", "kept-inputs"),
    ("shared", "shared", _kept(0, 2, 2), "(node 'basis_down')", "kept-inputs"),
    ("shared", "shared", _kept(0, 2, 6), "(node 'basis_down')", "kept-inputs"),
    ("shared", "shared", _kept(0, 2), "(node 'basis_down')", "kept-inputs"),
    ("shared", "shared", _kept(0, 1, 5), "gather 'gather_0' (node 'gather_0')", "gather-index"),
    ("shared", "shared", _other_index, "gather 'gather_0' (node 'gather_0')", "gather-index"),
    ("shared", "shared", _saved_index, "gather 'gather_0' (node 'gather_0')", "gather-index"),
    ("shared", "shared", _swapped_pieces, "node 'basis_down'", "pivot-pieces"),
    ("shared", "shared", lambda g: _place(g, "down", pivoted=False), "basis_down", "kept-inputs"),
    ("folded", "shared", _forgotten_basis, "slice 'up' (node 'up')", "folded-order"),
    ("shared", "shared", _sizes, "node 'split'", "piece-sizes"),
    ("stacked", "shared", lambda gm: None, "slice 'attn.0' (node 'attn_0')", "no-stack"),
    ("stacked", "lowered", _exchanged, "node 'attn_1'", "basis-reader"),
    ("stacked", "lowered", _sizes, "node 'split", "piece-sizes"),
    ("stacked", "lowered", _other_rows, "slice 'attn.5' (node 'attn_5')", "rank"),
    ("lowered", "lowered", _left_over, "origin 'basis_4'", "left-over"),
    ("lowered", "lowered", _lost_origin, "packed linear 'basis_0_to_basis_5'", "packed-origin"),
    ("lowered", "lowered", _far_origin, "origin 'basis_4'", "origin-rows"),
    ("lowered", "lowered", _other_batch, "node 'einsum'", "batched-product"),
]


@pytest.mark.parametrize(("made", "stage", "breaks", "where", "rule"), BROKEN)
def test_a_broken_graph_is_told_by_node_and_rule(
    made: str, stage: Stage, breaks: Break, where: str, rule: str
) -> None:
    gm = MAKE[made]()
    with_stage = {"folded": "shared", "stacked": "lowered"}.get(made, made)
    check(gm, with_stage)  # type: ignore[arg-type]
    breaks(gm)
    with pytest.raises(DialectError) as caught:
        check(gm, stage)
    message = str(caught.value)
    assert message.startswith(f"{stage} graph: ")
    assert where in message
    assert f"breaks rule '{rule}'" in message
    assert ": expected " in message
    assert ", found " in message


def test_each_stage_has_broken_graphs() -> None:
    for stage in STAGES:
        assert sum(one[1] == stage for one in BROKEN) >= 3
        names = [rule.name for rule in RULES[stage]]
        assert len(set(names)) == len(names)
    told = {rule for *_, rule in BROKEN}
    assert told == {rule.name for stage in STAGES for rule in RULES[stage]} - {"pivot-recorded"}


def test_slices_of_one_basis_agree_whether_it_is_pivoted() -> None:
    gm = fx.symbolic_trace(Model())
    first = run(gm, [SplitLinear(sites=(site_of(["down"], [(".a", 2), (".b", 2)]),))])[0]
    shared = SharedGroup(
        "basis", _random(3, WIDTH), {"down.a": _random(2, 3), "down.b": _random(2, 3)}
    )
    stored = PivotedGroup("basis", torch.tensor([0, 2, 5]), _random(3, 3), shared.coefficients)
    result = run(first, [ShareBasis(groups=(shared,)), PivotBasis(groups=(stored,))])[0]
    check(result, "shared")
    _place(result, "down.b", pivoted=False)
    with pytest.raises(
        DialectError, match=r"\(node 'basis'\) breaks rule 'pivot-recorded'.*down\.b"
    ):
        check(result, "shared")


def test_watching_tells_the_stage_and_the_pass_that_broke_it() -> None:
    for made, stage in (("captured", "captured"), ("split", "split"), ("folded", "shared")):
        assert stage_of(MAKE[made]()) == stage
    assert {stage_of(MAKE[made]()) for made in ("stacked", "lowered")} == {"lowered"}
    run(_shared(), lowering_passes(), watch=watch)
    broken = _shared()
    _other_reader(broken)
    with pytest.raises(
        DialectError, match="shared graph: node 'tanh_1' breaks rule 'basis-reader'"
    ):
        watch(ReuseBasis(), broken)
    # a pass that leads to a later stage is held to that, wherever the slices are
    with pytest.raises(DialectError, match=r"^shared graph"):
        watch(ReuseBasis(), _drop(MAKE["folded"](), "basis_down"))


def _drop(gm: fx.GraphModule, basis: str) -> fx.GraphModule:
    delattr(gm, basis)
    return gm


# Legal graphs: the fixture of tests/conftest.py checks every pass of every other test as well


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # pivoting a square basis
@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name)
def test_every_toy_is_legal_at_every_stage(toy: Toy) -> None:
    gm = captured(toy)
    check(gm, "captured")
    wanted = sites(toy, gm, "parts")
    exact = run(gm, default_passes(wanted), watch=watch)[0]
    check(exact, "split")
    factors = groups(exact, pool=True)
    pivot = PivotBasis(groups=tuple(pivoted(one) for one in factors))
    result = run(gm, default_passes(wanted, factors, [pivot]))[0]
    check(result, "shared")
    forget_origins(result)
    check(run(exact, lowering_passes())[0], "lowered")
    check(run(result, lowering_passes("speed"))[0], "lowered")


@pytest.mark.parametrize("name", ["phi3", "mixtral", "nn_transformer"])
def test_families_are_legal_at_every_stage(name: str) -> None:
    subject = family(name).subject()
    front = fxshare.capture.capture(subject.model, subject.example, mode="fx")
    check(front.graph, "captured")
    exact = compiled(subject)
    check(exact, "split")
    check(fxshare.lower(exact), "lowered")
    shared = compiled(subject, **SHARING)
    check(shared, "shared")
    check(fxshare.lower(shared, prefer="speed"), "lowered")


# What the rules brought to light


def test_the_index_of_a_gather_stays_out_of_the_state_when_a_graph_is_copied() -> None:
    source = _shared()
    assert "gather_0" not in source.state_dict()
    assert "gather_0" not in run(source, [CleanUp()])[0].state_dict()


class Folds(nn.Module):
    """Two layers of one pivoted basis: of the first alone the gather can be folded."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in (("up_0", WIDTH), ("up_1", WIDTH), ("down_0", 8), ("down_1", 8)):
            self.add_module(name, nn.Linear(WIDTH, rows))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 6) to (..., 8)."""
        h_0, h_1 = torch.relu(self.up_0(x)), torch.relu(self.up_1(x))
        return self.down_0(h_0) * self.down_1(h_1) + h_1.sum()


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_multiplying_out_puts_folded_rows_back(layers: tuple[int, ...]) -> None:
    gm = fx.symbolic_trace(Folds())
    split = run(gm, [SplitLinear(sites=whole_sites(gm))])[0]
    coefficients = {f"down_{layer}": _random(8, 5) for layer in layers}
    made = SharedGroup("basis", _random(5, WIDTH), coefficients)
    stored = PivotedGroup("basis", torch.tensor([0, 1, 2, 4, 5]), _random(5, 1), coefficients)
    passes = [ShareBasis(groups=(made,)), PivotBasis(groups=(stored,)), FoldGathers()]
    folded, applied = run(split, passes)
    assert applied[-1].rewrites == 1
    result, (materialised,) = run(folded, [Materialise(margin=2.0)])
    assert materialised.rewrites == len(layers)
    check(result, "split")
    assert "basis" in {origin.order for origin in origins(folded).values()}
    assert {origin.order for origin in origins(result).values()} == {None}
    assert equal_outputs(folded, result, [x_of(6)], tolerance=1e-12)
    for name in slices(folded):
        torch.testing.assert_close(slice_weight(folded, name), slice_weight(result, name))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, 2), (2, 5)], None),
        ([(2, 5), (0, 2)], None),
        ([(0, 3), (2, 5)], "rows 2:5 where row 3 of 5 is next"),
        ([(0, 2), (3, 5)], "rows 3:5 where row 2 of 5 is next"),
        ([(0, 2), (2, 2), (2, 5)], "rows 2:2 where row 2 of 5 is next"),
        ([(1, 5)], "rows 1:5 where row 0 of 5 is next"),
        ([(0, 4)], "4 rows of 5"),
        ([(0, 6)], "6 rows of 5"),
    ],
)
def test_rows_are_a_partition(rows: list[tuple[int, int]], told: str | None) -> None:
    assert findings._gap(rows, 5) == told
