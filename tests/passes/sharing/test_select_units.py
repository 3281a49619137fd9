"""SelectUnits: smaller linears of the same structure, found between them, and what it refuses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes import (
    KeptUnits,
    NotHidden,
    RequiresError,
    Rows,
    SelectedUnits,
    SelectUnits,
    ShapeError,
    SplitSite,
    dialect,
    hidden_units,
    linear_calls,
    run,
    slice_weight,
    slices,
)
from passes.errors import DialectError
from passes.graph.slices import set_slices
from tests.passes.build import split, whole_sites

WIDTH, UNITS = 5, 8
Between = Callable[[nn.Module, Tensor], Tensor]


class Mlp(nn.Module):
    """An MLP whose middle is given."""

    def __init__(self, between: Between, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.gate = nn.Linear(WIDTH, 2 * UNITS if fused else UNITS)
        self.up = nn.Linear(WIDTH, UNITS)
        self.down = nn.Linear(UNITS, WIDTH)
        self.scale = nn.Parameter(torch.rand(UNITS))
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.act, self.drop = nn.GELU(approximate="tanh"), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self, x))


def conv1d(m: nn.Module, x: Tensor) -> Tensor:
    """What GPT-2's Conv1D does around a product."""
    y = m.gate(x.view(-1, x.size(-1))).view(x.size()[:-1] + (UNITS,))  # noqa: RUF005 - as it is written there
    y = 0.5 * y * (1.0 + torch.tanh(y + 0.044715 * torch.pow(y, 3.0)))
    return y.view(-1, y.size(-1)).view(x.size()[:-1] + (UNITS,))  # noqa: RUF005 - as it is written there


FOUND: dict[str, tuple[Between, bool]] = {
    "plain": (lambda m, x: F.relu(m.gate(x)), False),
    "gated": (lambda m, x: F.silu(m.gate(x)) * m.up(x), False),
    "module": (lambda m, x: m.drop(m.act(m.gate(x))), False),
    "in place": (lambda m, x: F.relu_(m.gate(x)), False),
    "casts": (lambda m, x: F.silu(m.gate(x).to(torch.float64)).to(x.dtype) * m.up(x), False),
    "scalar parameter": (lambda m, x: m.factor * m.gate(x).sigmoid(), False),
    "no activation": (lambda m, x: m.gate(x), False),
    "limited": (lambda m, x: (m.up(x).clamp(-7, 7) + 1) * m.gate(x).clamp(max=7), False),
    "views": (conv1d, False),
    "chunk": (lambda m, x: _product(m.gate(x).chunk(2, dim=-1)), True),
    "split": (lambda m, x: _product(m.gate(x).split(UNITS, dim=-1)), True),
    "split in sizes": (lambda m, x: _product(m.gate(x).split([UNITS, UNITS], -1)), True),
    "slices": (lambda m, x: m.gate(x)[..., :UNITS] * F.silu(m.gate(x)[..., UNITS:]), True),
    "glu": (lambda m, x: F.glu(m.gate(x), dim=-1), True),
    "in turn": (lambda m, x: in_turn(m.gate(x)), True),
    "in turn, and one more": (lambda m, x: in_turn(m.gate(x).clamp(max=2)) * m.up(x), True),
    "in turn from zero": (lambda m, x: m.gate(x)[..., 0::2].sigmoid(), True),
}
LEFT: dict[str, tuple[Between, str]] = {
    "softmax": (lambda m, x: m.gate(x).softmax(-1), "'softmax' .* comes before it"),
    "norm": (lambda m, x: F.layer_norm(m.gate(x), (UNITS,)), "'layer_norm' .* comes before it"),
    "residual": (lambda m, x: m.gate(x) + F.pad(x, (0, 3)), "'pad' .* comes before it"),
    "own scale": (lambda m, x: m.scale * m.gate(x), "'scale' .* comes before it"),
    "constant": (lambda m, x: m.gate(x) + m.scale.expand(4, UNITS), "'expand' .* before it"),
    "heads": (lambda m, x: m.gate(x).unflatten(-1, (2, 4)).relu().flatten(-2), "comes before it"),
    "size": (lambda m, x: m.gate(x) * m.gate(x).size(-1), "takes the size of|comes before it"),
    "interleaved": (lambda m, x: m.gate(x) + m.up(x)[..., ::2], "'getitem' takes, which does not"),
}


def in_turn(y: Tensor) -> Tensor:
    """What GPT-OSS has between its linears."""
    gate, up = y[..., ::2].clamp(max=1), y[..., 1::2].clamp(-1, 1)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def _product(pieces: tuple[Tensor, Tensor]) -> Tensor:
    return F.silu(pieces[0]) * pieces[1]


def graph(between: Between, fused: bool = False) -> fx.GraphModule:
    gm = fx.symbolic_trace(Mlp(between, fused).double())
    return split(gm, *whole_sites(gm))


def selection(gm: fx.GraphModule, kept: tuple[int, ...] = (1, 2, 6)) -> SelectedUnits:
    producers = {
        call.name: call.weight_OI.shape[0] // UNITS
        for call in linear_calls(gm)
        if call.name != "down"
    }
    down = gm.get_submodule("down")
    weight = down.weight.detach()[:, list(kept)] * 1.5
    bias = down.bias.detach() + 1.0
    steps = [n.args[1] for n in gm.graph.nodes if n.target is operator.getitem]
    turns = any(isinstance(at, tuple) and at[1].step == 2 for at in steps)
    alternating = frozenset({"gate"}) if turns else frozenset()
    new = {"down": weight}, {"down": bias}
    return SelectedUnits("units", kept, UNITS, producers, *new, alternating)


def expected(gm: fx.GraphModule, one: SelectedUnits, x: Tensor) -> Tensor:
    """The dense graph with the consumer's other columns at zero."""
    whole, _ = run(gm, [])
    down = whole.get_submodule("down")
    new = nn.Linear(UNITS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, list(one.kept)] = one.consumers["down"]
        new.bias.copy_(one.biases["down"])
    assert down.weight.shape == new.weight.shape
    whole.down = new
    return whole(x)


@pytest.mark.parametrize("case", FOUND)
@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 3, WIDTH)])
def test_what_is_left_computes_what_the_consumer_reads(case: str, shape: tuple[int, ...]) -> None:
    gm = graph(*FOUND[case])
    one = selection(gm)
    result, (applied,) = run(gm, [SelectUnits(selections=(one,))])
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm.eval(), result.eval()
    torch.testing.assert_close(result(x), expected(gm, one, x), rtol=1e-12, atol=1e-12)
    assert applied.rewrites == len(one.producers) + 1
    assert not applied.exact
    sizes = {name: tuple(result.get_submodule(name).weight.shape) for name in one.producers}
    assert sizes == {name: (3 * parts, WIDTH) for name, parts in one.producers.items()}
    assert result.get_submodule("down").in_features == 3
    dialect.check(result, "split")


def test_rows_in_turn_stay_in_turn() -> None:
    gm = graph(*FOUND["in turn"])
    result, _ = run(gm, [SelectUnits(selections=(selection(gm),))])
    old, new = (one.get_submodule("gate") for one in (gm, result))
    at = [2, 3, 4, 5, 12, 13]
    assert torch.equal(new.weight, old.weight[at])
    assert torch.equal(new.bias, old.bias[at])
    rows = slice_weight(result, "gate")
    assert torch.equal(rows[at], old.weight[at])
    assert rows.count_nonzero() == 6 * WIDTH
    ours, theirs = (
        [n.args[1] for n in one.graph.nodes if n.target is operator.getitem] for one in (gm, result)
    )
    assert ours == theirs == [(..., slice(None, None, 2)), (..., slice(1, None, 2))]


@pytest.mark.parametrize("case", ["in turn", "chunk"])
def test_a_selection_in_runs_of_what_alternates_is_refused_and_the_other_way_round(
    case: str,
) -> None:
    gm = graph(*FOUND[case])
    one = selection(gm)
    wrong = replace(one, alternating=frozenset({"gate"}) - one.alternating)
    with pytest.raises(RequiresError, match=r"'gate' the rows of a unit .* neighbours"):
        run(gm, [SelectUnits(selections=(wrong,))])


IN_TURN_LEFT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "not from the first": (lambda y: y[..., 2::2], "'getitem' takes, which does not follow"),
    "not to the end": (lambda y: y[..., :UNITS:2], "'getitem' takes, which does not follow"),
    "another step": (lambda y: y[..., ::3], "'getitem' takes, which does not follow"),
    "in a half": (lambda y: y.chunk(2, -1)[0][..., ::2], "'getitem_1' takes, which does not"),
    "both": (lambda y: y[..., ::2] + y[..., :UNITS], "rows of 'gate' in turn, and in runs"),
    "both, later": (
        lambda y: y.sigmoid()[..., ::2] * y.tanh().chunk(2, -1)[1],
        "rows of 'gate' in turn, and in runs",
    ),
}


@pytest.mark.parametrize("case", IN_TURN_LEFT)
def test_rows_in_another_turn_are_left_alone_with_the_reason(case: str) -> None:
    between, reason = IN_TURN_LEFT[case]
    gm = graph(lambda m, x: between(m.gate(x)), True)
    gate, down = (call.node for call in linear_calls(gm) if call.name != "up")
    with pytest.raises(NotHidden, match=reason):
        hidden_units(gm, [down], {gate: ("gate", 2 * UNITS)}.get, UNITS)


def test_a_quarter_in_turn_is_no_unit() -> None:
    """Two runs, each with gate and up in turn."""
    gm = graph(lambda m, x: m.gate(x).chunk(2, -1)[0][..., ::2], True)
    gate, down = (call.node for call in linear_calls(gm) if call.name != "up")
    with pytest.raises(NotHidden, match="rows of 'gate' in turn, and in runs"):
        hidden_units(gm, [down], {gate: ("gate", 2 * UNITS)}.get, UNITS // 2)


def test_rows_in_turn_of_two_slices_are_refused() -> None:
    gm = fx.symbolic_trace(Mlp(*FOUND["in turn"]).double())
    halves = Rows("gate.a", 0, UNITS), Rows("gate.b", UNITS, 2 * UNITS)
    down = SplitSite(("down",), (Rows("down", 0, WIDTH),))
    gm = split(gm, SplitSite(("gate",), halves), down)
    weight = gm.get_submodule("down").weight.detach()[:, :2]
    one = SelectedUnits("units", (0, 1), UNITS, {"gate.a": 1, "gate.b": 1}, {"down": weight})
    for turns in (frozenset(), frozenset({"gate.a"})):
        with pytest.raises(RequiresError, match="neighbours in one slice"):
            run(gm, [SelectUnits(selections=(replace(one, alternating=turns),))])


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_hidden_unit_is_left_alone_with_the_reason(case: str) -> None:
    between, reason = LEFT[case]
    gm = graph(between)
    names = {call.node: call.name for call in linear_calls(gm)}
    (down,) = (node for node, name in names.items() if name == "down")

    def leaf(node: fx.Node) -> tuple[str, int] | None:
        return None if node not in names else (names[node], UNITS)

    with pytest.raises(NotHidden, match=reason):
        hidden_units(gm, [down], leaf, UNITS)
    with pytest.raises(RequiresError, match="leave 'units' out"):
        run(gm, [SelectUnits(selections=(replace(selection(gm), producers={"gate": 1}),))])


def test_a_size_that_others_read_is_left_as_it_is_where_it_is_not_that_of_units() -> None:
    """GPT-2's second Conv1D takes the size of what it reads but for the last."""

    class Two(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.gate(x))
            return self.down(h.view(-1, h.size(-1))).view(h.size()[:-1] + (WIDTH,))  # noqa: RUF005

    gm = fx.symbolic_trace(Two(FOUND["plain"][0]).double())
    gm = split(gm, *whole_sites(gm))
    result, _ = run(gm, [SelectUnits(selections=(selection(gm),))])
    assert result(torch.randn(2, 3, WIDTH, dtype=torch.float64)).shape == (2, 3, WIDTH)


def test_units_that_something_else_reads_are_left_alone() -> None:
    class Returned(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.gate(x))
            return self.down(h), h.sum(-1)

    gm = fx.symbolic_trace(Returned(FOUND["plain"][0]).double())
    gm = split(gm, *whole_sites(gm))
    with pytest.raises(RequiresError, match="'down' reads what goes to 'sum_1' as well"):
        run(gm, [SelectUnits(selections=(selection(gm),))])


def test_a_producer_that_computes_for_something_else_too_is_refused() -> None:
    class Twice(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.down(F.relu(self.gate(x))), self.gate(-x)

    gm = fx.symbolic_trace(Twice(FOUND["plain"][0]).double())
    gm = split(gm, *whole_sites(gm))
    with pytest.raises(RequiresError, match="computes units of 'units' for something else"):
        run(gm, [SelectUnits(selections=(selection(gm),))])


def test_an_mlp_that_is_called_twice_is_one() -> None:
    class Twice(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + super().forward(x))

    gm = fx.symbolic_trace(Twice(FOUND["plain"][0]).double())
    gm = split(gm, *whole_sites(gm))
    one = selection(gm)
    result, _ = run(gm, [SelectUnits(selections=(one,))])
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(result(x), expected(gm, one, x), rtol=1e-12, atol=1e-12)


def test_all_units_are_the_identity() -> None:
    gm = graph(*FOUND["gated"])
    one = selection(gm, tuple(range(UNITS)))
    result, (applied,) = run(gm, [SelectUnits(selections=(one,))])
    assert applied.rewrites == 0
    assert result.get_submodule("down").weight is gm.get_submodule("down").weight


def test_the_weight_of_a_slice_has_zeros_where_units_are_gone() -> None:
    gm = graph(*FOUND["chunk"])
    one = selection(gm)
    result, _ = run(gm, [SelectUnits(selections=(one,))])
    rows = slice_weight(result, "gate")
    old = gm.get_submodule("gate").weight
    at = [1, 2, 6, 9, 10, 14]
    assert torch.equal(rows[at], old[at])
    assert rows.count_nonzero() == 6 * WIDTH
    columns = slice_weight(result, "down")
    assert torch.equal(columns[:, [1, 2, 6]], one.consumers["down"])
    assert columns.count_nonzero() == 3 * WIDTH


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"kept": (2, 1)}, RequiresError, "not ascending numbers from 0 to 7"),
        ({"kept": (1, 2, 8)}, RequiresError, "not ascending numbers from 0 to 7"),
        ({"kept": ()}, RequiresError, "not ascending numbers from 0 to 7"),
        ({"producers": {"up": 1, "nowhere": 1}}, RequiresError, "'nowhere' .* still whole"),
        ({"producers": {"gate": 2, "up": 1}}, ShapeError, "'gate' has 8 rows, expected 2 times 8"),
        ({"consumers": {"down": torch.zeros(WIDTH, 4)}}, ShapeError, "gets a weight .5, 4."),
        ({"producers": {"gate": 1}}, RequiresError, "from matched linears alone"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, object], error: type[Exception], reason: str
) -> None:
    gm = graph(*FOUND["gated"])
    with pytest.raises(error, match=reason):
        run(gm, [SelectUnits(selections=(replace(selection(gm), **changes),))])


@pytest.mark.broken_graphs
@pytest.mark.parametrize(
    ("kept", "found"),
    [((1, 6, 2), "not ascending"), ((1, 2), "3 where 1 times 2"), ((1, 2, 5), "other units than")],
)
def test_the_dialect_notices_other_units(kept: tuple[int, ...], found: str) -> None:
    gm = graph(*FOUND["gated"])
    result, _ = run(gm, [SelectUnits(selections=(selection(gm),))])
    wrong = replace(slices(result)["up"], unit_rows=KeptUnits("units", UNITS, kept))
    set_slices(result, {"up": wrong})
    with pytest.raises(DialectError, match=f"hidden-units.*{found}"):
        dialect.check(result, "split")


def test_trainable_stays_trainable_and_frozen_frozen() -> None:
    gm = graph(*FOUND["gated"])
    gm.get_submodule("gate").weight.requires_grad_(False)
    result, _ = run(gm, [SelectUnits(selections=(selection(gm),))])
    flags = {name: p.requires_grad for name, p in result.named_parameters()}
    assert flags["gate.weight"] is False
    assert flags["gate.bias"] is flags["up.weight"] is flags["down.weight"] is True
