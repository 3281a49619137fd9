"""DropJoins: every expert's steps by themselves, in each way to put experts together, or not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxshare.capture import capture
from passes import (
    DropJoins,
    NotHidden,
    RequiresError,
    SelectedUnits,
    SelectUnits,
    UnstackExperts,
    hidden_units,
    kept_joins,
    linear_calls,
    run,
    stacks,
)
from passes.graph.graph import new_linear, put_module
from tests.passes.build import split, whole_sites

E, WIDTH, UNITS, S = 3, 4, 6, 7
WANTED = torch.tensor([2, 0, 2, 2, 0, 0, 2])  # nobody wants 1
ENDS = torch.tensor([3, 3, 5], dtype=torch.int32)  # none for 1, and two rows are nobody's
Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
Between = Callable[[Tensor], Tensor]


def _gathered(x: Tensor, w: Tensor, wanted: Tensor) -> Tensor:
    return torch.bmm(w[wanted], x.unsqueeze(-1)).squeeze(-1)


# what is multiplied is (S, ·) where rows are routed, (E, S, ·) elsewhere
HOW: dict[str, Multiply] = {
    "gathered": _gathered,
    "gathered in a dimension of one": lambda x, w, wanted: torch.matmul(x, w[wanted].mT),
    "all at once": lambda x, w, _: torch.bmm(x, w.mT),
    "all read one": lambda x, w, _: x @ w.mT,
    "batches": lambda x, w, _: torch.matmul(x, w.mT),
    "einsum": lambda x, w, _: torch.einsum("eti,eoi->eto", x, w),
    "one by one": lambda x, w, _: torch.stack([F.linear(x[e], w[e]) for e in range(E)]),
    "sizes": lambda x, w, _: torch.cat(
        [F.linear(run, w[e]) for e, run in enumerate(x.split([3, 0, 4]))]
    ),
    "runs": lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends),
}
_SHAPES = {
    "gathered": (S, WIDTH),
    "gathered in a dimension of one": (S, 1, WIDTH),
    "all read one": (S, WIDTH),
    "batches": (2, E, S, WIDTH),
    "runs": (S, WIDTH),
    "sizes": (S, WIDTH),
}


def gated(y: Tensor) -> Tensor:
    """What nearly all experts have between their linears."""
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def in_turn(y: Tensor) -> Tensor:
    """What GPT-OSS has between them: gate and up row by row."""
    return F.silu(y[..., ::2]) * (y[..., 1::2] + 1)


class Mixture(nn.Module):
    """Experts that are multiplied by in a given way, with something between."""

    def __init__(self, how: str, between: Between, wide: int = 2 * UNITS) -> None:
        super().__init__()
        torch.manual_seed(0)
        # grouped products take no float64, and rows of 16 bytes alone
        dtype = torch.float32 if how == "runs" else torch.float64
        self.size = 4 if how == "runs" else 1
        self.up = nn.Parameter(torch.randn(E, wide * self.size, WIDTH * self.size, dtype=dtype))
        shape = (E, WIDTH * self.size, UNITS * self.size)
        self.down = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.multiply, self.between = HOW[how], between

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.multiply(self.between(self.multiply(x, self.up, given)), self.down, given)


def _call(how: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return _x(how, seed), ENDS if how == "runs" else WANTED


def _x(how: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    *rows, width = _SHAPES.get(how, (E, S, WIDTH))
    if how == "runs":
        return torch.randn(*rows, 4 * width, generator=generator)
    return torch.randn(*rows, width, dtype=torch.float64, generator=generator)


def _graph(model: nn.Module, how: str = "gathered") -> fx.GraphModule:
    """The graph of a model with its experts apart."""
    gm = capture(model, _call(how), mode="fx").graph
    result, _ = run(gm, [UnstackExperts(parameters=tuple(stacks(gm)))])
    return result


def _output(gm: nn.Module, *given: Tensor) -> Tensor:
    found = gm(*given)
    first = torch.utils._pytree.tree_leaves(found)[0]
    assert isinstance(first, Tensor)
    return first


def _reads_own(gm: fx.GraphModule, expert: int) -> bool:
    """Whether what the second linear of an expert reads is its own hidden units alone."""
    calls = {call.name: call for call in linear_calls(gm)}
    rows = {calls[f"up.{expert}"].node: calls[f"up.{expert}"].weight_OI.shape[0]}
    down = calls[f"down.{expert}"]
    width = down.weight_OI.shape[1]

    def leaf(node: fx.Node) -> tuple[str, int] | None:
        return ("up", rows[node]) if node in rows else None

    try:
        found = hidden_units(gm, [down.node], leaf, width)
    except NotHidden:
        return False
    return list(found.leaves) == list(rows)


@pytest.mark.parametrize("how", HOW)
def test_every_expert_reads_what_it_made_itself(how: str) -> None:
    gm = _graph(Mixture(how, gated), how)
    assert not any(_reads_own(gm, expert) for expert in range(E))
    result, (applied,) = run(gm, [DropJoins()])
    assert all(_reads_own(result, expert) for expert in range(E))
    assert (applied.rewrites, applied.exact) == (E, True)
    x = _call(how, seed=1)
    ours, theirs = _output(result, *x), _output(gm, *x)
    ours, theirs = (y[:5] for y in (ours, theirs)) if how == "runs" else (ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    # what it was put together for is there as it was, and nothing is left over
    assert len(kept_joins(result)) == len(kept_joins(gm))
    assert all(
        node.users or node.op == "output" for node in result.graph.nodes if node.op != "placeholder"
    )
    again, (nothing,) = run(result, [DropJoins()])
    assert nothing.rewrites == 0
    assert str(again.graph) == str(result.graph)


@pytest.mark.parametrize("between", [gated, in_turn])
@pytest.mark.parametrize("how", HOW)
def test_experts_may_then_be_of_different_widths(how: str, between: Between) -> None:
    gm = _graph(Mixture(how, between), how)
    units = gm.get_submodule("down.0").in_features
    gm = split(gm, *whole_sites(gm))
    chosen = []
    for expert in range(E):
        kept = tuple(range(expert, units, expert + 1))
        weight = gm.get_submodule(f"down.{expert}").weight.detach()[:, list(kept)]
        own = {f"down.{expert}": weight}
        one = SelectedUnits(f"units_{expert}", kept, units, {f"up.{expert}": 2}, own)
        turns = frozenset({f"up.{expert}"} if between is in_turn else ())
        chosen.append(replace(one, alternating=turns))
    with pytest.raises(RequiresError, match=r"index_select|select|getitem"):
        run(gm, [SelectUnits(selections=tuple(chosen))])
    result, _ = run(gm, [DropJoins(), SelectUnits(selections=tuple(chosen))])
    zeros, _ = run(gm, [])
    for one in chosen:
        ((name, weight),) = one.consumers.items()
        whole = torch.zeros_like(zeros.get_submodule(name).weight)
        whole[:, list(one.kept)] = weight
        linear = new_linear(whole, None, requires_grad=False, training=False)
        put_module(zeros, name, linear)
        assert result.get_submodule(name).in_features == len(one.kept)
    x = _call(how, seed=1)
    ours, theirs = _output(result, *x), _output(zeros, *x)
    ours, theirs = (y[:5] for y in (ours, theirs)) if how == "runs" else (ours, theirs)
    assert (theirs - _output(gm, *x)[: len(theirs)]).abs().max() > 1e-2
    rtol = 1e-4 if how == "runs" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_only_those_that_are_named_are_taken_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (Mixture("gathered", gated) for _ in range(2))

        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(x, wanted), wanted)
            return found

    gm = _graph(Two())
    result, (applied,) = run(gm, [DropJoins(linears=("second.down.1",))])
    assert applied.rewrites == E
    names = {call.name: call.input.target for call in linear_calls(result)}
    assert all(names[f"first.down.{expert}"] == "index_select" for expert in range(E))
    assert not any(names[f"second.down.{expert}"] == "index_select" for expert in range(E))
    x = _call("gathered", seed=1)
    torch.testing.assert_close(result(*x), gm(*x), rtol=0, atol=0)


def test_gate_and_up_may_be_two_stacks_and_have_the_dtype_of_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up = (
                nn.Parameter(torch.randn(E, UNITS, WIDTH, dtype=torch.float64)) for _ in range(2)
            )
            self.down = nn.Parameter(torch.randn(E, WIDTH, UNITS, dtype=torch.float64))

        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            gate, up = _gathered(x, self.gate, wanted), _gathered(x, self.up, wanted)
            return _gathered(F.silu(gate.float()).to(up.dtype) * up, self.down, wanted)

    gm = _graph(Two())
    result, (applied,) = run(gm, [DropJoins()])
    assert applied.rewrites == E
    x = _call("gathered", seed=1)
    torch.testing.assert_close(result(*x), gm(*x), rtol=0, atol=0)
    joins = [node for node in result.graph.nodes if "joined_rows" in node.name]
    assert len(joins) == 1


def _weighted(y: Tensor) -> Tensor:
    return gated(y) * torch.linspace(0, 1, S, dtype=y.dtype)[:, None]


class Scaled(nn.Module):
    """What lies between has a number for all, in a tensor of as many dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Mixture("all at once", gated)
        self.experts.between = self.between
        self.scale = nn.Parameter(torch.full((1, 1, 1), 2.0, dtype=torch.float64))

    def between(self, y: Tensor) -> Tensor:
        return gated(y) * self.scale

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        found: Tensor = self.experts(x, given)
        return found


def test_a_number_in_more_dimensions_than_an_expert_has_is_left() -> None:
    gm = _graph(Scaled(), "all at once")
    _, (applied,) = run(gm, [DropJoins()])
    assert applied.rewrites == 0
    calls = {call.name: call.input for call in linear_calls(gm)}
    assert "makes of the rows of all experts" in kept_joins(gm)[calls["experts.down.1"]]


LEFT: dict[str, tuple[str, Between, str]] = {
    "a sum over rows": ("gathered", lambda y: gated(y).cumsum(0), "'cumsum' .* comes before it"),
    "of each row": ("gathered", _weighted, "'.*' .* comes before it"),
    "in place": ("gathered", lambda y: gated(y.mul_(2.0)), "makes of the rows of all experts"),
    "view": ("gathered", lambda y: gated(y).view(-1, UNITS), "makes of the rows of all experts"),
    "dropout": ("all at once", lambda y: F.dropout(gated(y), 0.5, False), "makes of the rows of"),
    "size": ("gathered", lambda y: gated(y) * y.size(0), "counts|comes before it"),
    "interleaved": ("gathered", lambda y: y[..., ::2] * y[..., :UNITS], "in turn, and in runs"),
    "half": ("all at once", lambda y: y[..., :UNITS] * y.size(0), "counts|comes before it"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_more_than_steps_of_single_rows_is_left_with_the_reason(case: str) -> None:
    how, between, reason = LEFT[case]
    gm = _graph(Mixture(how, between), how)
    result, (applied,) = run(gm, [DropJoins()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(gm.graph)
    reasons = kept_joins(gm)
    calls = {call.name: call.input for call in linear_calls(gm)}
    for expert in range(E):
        assert re.search(reason, reasons[calls[f"down.{expert}"]])


def test_what_something_else_reads_is_left_with_the_reason() -> None:
    class Returned(Mixture):
        def forward(self, x: Tensor, wanted: Tensor) -> Any:
            hidden = self.between(self.multiply(x, self.up, wanted))
            return self.multiply(hidden, self.down, wanted), hidden.sum()

    gm = _graph(Returned("all at once", gated), "all at once")
    _, (applied,) = run(gm, [DropJoins()])
    assert applied.rewrites == 0
    calls = {call.name: call.input for call in linear_calls(gm)}
    assert kept_joins(gm)[calls["down.1"]] == "reads what goes to 'sum_1' as well"


def test_an_expert_that_reads_what_others_made_is_left() -> None:
    class Rerouted(Mixture):
        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            hidden = self.between(_gathered(x, self.up, wanted))
            return _gathered(hidden, self.down, wanted.flip(0))

    gm = _graph(Rerouted("gathered", gated))
    _, (applied,) = run(gm, [DropJoins()])
    assert applied.rewrites == 0
    calls = {call.name: call.input for call in linear_calls(gm)}
    assert "'joined_rows' (call_function) comes before it" in kept_joins(gm)[calls["down.0"]]
