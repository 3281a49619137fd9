"""Stacks of experts: every way to multiply by them, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxshare.capture import capture
from passes import UnstackExperts, linear_calls, run, stacks, unstacked_as

E, I, O, S = 3, 6, 10, 7  # noqa: E741 - experts, input and output features, rows
Multiply = Callable[[Tensor, Tensor], Tensor]


def _each(x: Tensor, matrices: Any) -> Tensor:
    return torch.stack([F.linear(x[e], w) for e, w in enumerate(matrices)])


def _runs(x: Tensor, w: Tensor) -> Tensor:
    rows = x.flatten(0, 1).split([4, 1, 3 * x.shape[1] - 5])
    return torch.cat([F.linear(rows[e], w[e]) for e in range(E)])


def _by_routing(of: Callable[[Tensor, Tensor], Tensor]) -> Multiply:
    """Of inputs for each expert the rows of those that are wanted: nobody wants 1."""
    return lambda x, w: of(x.transpose(0, 1)[:, 0], w[torch.tensor([2, 0, 2, 2, 0, 0, 2])])


# x is (E, S, I); the stack (E, O, I), then (E, I, O)
BY_ROWS: dict[str, Multiply] = {
    "bmm transpose": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "bmm mT": lambda x, w: x.bmm(w.mT),
    "bmm weight first": lambda x, w: torch.bmm(w, x.transpose(1, 2)),
    "matmul": lambda x, w: x @ w.permute(0, 2, 1),
    "matmul shared": lambda x, w: torch.matmul(x[0], w.transpose(-2, -1)),
    "matmul a vector": lambda x, w: torch.matmul(w, x[0, 0]),
    "matmul broadcast": lambda x, w: x[:1] @ w.mT,
    "matmul batch": lambda x, w: x[None].expand(2, -1, -1, -1) @ w.mT,
    "matmul weight first": lambda x, w: w @ x.mT,
    "einsum": lambda x, w: torch.einsum("eti,eoi->eto", x, w),
    "einsum order": lambda x, w: torch.einsum("eoi,eti->toe", w, x),
    "einsum shared": lambda x, w: torch.einsum("ti,eoi->teo", x[0], w),
    "einsum shared turned": lambda x, w: torch.einsum("it,eoi->teo", x[0].mT, w),
    "einsum turned": lambda x, w: torch.einsum("iet,eoi->eto", x.permute(2, 0, 1), w),
    "einsum dots": lambda x, w: torch.einsum("...ei,eoi->...eo", x.transpose(0, 1), w),
    "einsum total": lambda x, w: torch.einsum("eti,eoi->to", x, w),
    "F.linear": lambda x, w: _each(x, [w[e] for e in range(E)]),
    "iterates": lambda x, w: _each(x, w),
    "unbind": lambda x, w: _each(x, w.unbind(0)),
    "select": lambda x, w: _each(x, [torch.select(w, 0, e) for e in range(E)]),
    "chunk": lambda x, w: _each(x, [one.squeeze(0) for one in w.chunk(E)]),
    "split": lambda x, w: _each(x, [one[0] for one in torch.split(w, 1, 0)]),
    "slices": lambda x, w: _each(x, [w[e : e + 1].squeeze(0) for e in range(E)]),
    "dots": lambda x, w: _each(x, [w[e, :, :] for e in range(E)]),
    "@ T": lambda x, w: torch.stack([x[e] @ w[e].T for e in range(E)]),
    "from the end": lambda x, w: torch.stack([x[e] @ w[-e].T for e in range(E)]),
    "runs": _runs,
    "with its size": lambda x, w: torch.bmm(x.view(w.shape[0], -1, w.size(2)), w.mT),
    "cast": lambda x, w: torch.bmm(x, w.to(x.dtype).mT),
    "chunks": lambda x, w: torch.bmm(x, w.chunk(2, 1)[0].mT) * torch.bmm(x, w.chunk(2, 1)[1].mT),
    "chunks after": lambda x, w: sum(torch.bmm(x, p) for p in w.mT.chunk(2, dim=-1)),
    "split of each": lambda x, w: torch.cat([
        F.linear(x[e], p) for e in range(E) for p in w[e].split([4, 6])
    ], -1),
    "slices of rows": lambda x, w: torch.einsum("eti,eoi->eto", x, w[:, :3]).sum()
    + torch.einsum("eti,eoi->eto", x, w[:, 3:]),
    "gathered chunks": _by_routing(lambda x, w: sum(
        torch.bmm(p, x.unsqueeze(-1)).squeeze(-1) for p in w.chunk(2, 1)
    )),
    "gathered weight first": _by_routing(lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1)),
    "gathered einsum": _by_routing(lambda x, w: torch.einsum("si,soi->os", x, w)),
    "gathered einsum turned": _by_routing(lambda x, w: torch.einsum("is,soi->os", x.mT, w)),
    "index_select": lambda x, w: torch.bmm(x, w.index_select(0, torch.tensor([2, 2, 0])).mT),
}  # fmt: skip
BY_COLUMNS: dict[str, Multiply] = {
    "bmm": lambda x, w: torch.bmm(x, w),
    "dots": lambda x, w: torch.bmm(x, w[..., :4]).sum() + torch.bmm(x, w[..., 4:]),
    "baddbmm": lambda x, w: torch.baddbmm(x[:, :1, :1], x, w),
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("eti,eio->eto", x, w),
    "@": lambda x, w: torch.stack([x[e] @ w[e] for e in range(E)]),
    "addmm": lambda x, w: torch.stack([torch.addmm(x[e, :1, :1], x[e], w[e]) for e in range(E)]),
    "gathered": _by_routing(lambda x, w: torch.matmul(x.unsqueeze(1), w).squeeze(1)),
    "gathered einsum": _by_routing(lambda x, w: torch.einsum("si,sio->so", x, w)),
}
# no linear for each matrix, or not for the matrices as they are stored; the stack is (E, O, I)
OTHERS: dict[str, Multiply] = {
    "contracts the experts": lambda x, w: torch.einsum("eti,eoi->tio", x, w),
    "contracts the rows too": lambda x, w: torch.einsum("eti,eoi->eo", x, w),
    "one matrix with heads": lambda x, w: torch.einsum("ste,eoi->stoi", x[..., :E], w),
    "scaled": lambda x, w: torch.bmm(x, w.mT * 2.0),
    "also summed": lambda x, w: torch.bmm(x, w.mT) + w.sum(),
    "a few": lambda x, w: torch.bmm(x[:2], w[:2].mT),
    "half of the rows": lambda x, w: torch.bmm(x, w[:, :5].mT),
    "half of the columns": lambda x, w: torch.bmm(x[..., :3], w[..., :3].mT),
    "halves of two inputs": lambda x, w: torch.bmm(x, w[:, :5].mT) + torch.bmm(x + 1, w[:, 5:].mT),
    "a cut of a cut": lambda x, w: (
        torch.bmm(x, w[:, 2:][:, :2].mT).sum() + torch.bmm(x, w[:, 2:].mT)
    ),
    "element by element": lambda x, w: torch.mul(x[:, :1], w),
    "rows of one": lambda x, w: F.linear(x, w[0, :5]),
    "cast to another dtype": lambda x, w: torch.bmm(x.float(), w.float().mT),
    "with itself": lambda x, w: x[0, 0, 0] * torch.bmm(w, w.mT),
}


def _on(name: str) -> tuple[str, ...]:
    """The front ends; torch.export bakes the number of inputs where it is looked at."""
    return ("fx",) if name == "with its size" else ("fx", "export")


class Mixture(nn.Module):
    def __init__(self, multiply: Multiply, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.stack)


def _graph(multiply: Multiply, shape: tuple[int, ...], mode: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Mixture(multiply, shape), _x(0), mode=mode).graph


def _x(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E, S, I, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("multiply", "transposed", "mode"), [
    *(pytest.param(m, False, e, id=f"rows {n} {e}") for n, m in BY_ROWS.items() for e in _on(n)),
    *(pytest.param(m, True, e, id=f"columns {n} {e}") for n, m in BY_COLUMNS.items()
      for e in _on(n)),
])  # fmt: skip
def test_every_way_to_multiply_becomes_linears(
    multiply: Multiply, transposed: bool, mode: str
) -> None:
    gm = _graph(multiply, (E, I, O) if transposed else (E, O, I), mode)
    found = stacks(gm)["stack"]
    assert {stack.transposed for stack in found} == {transposed}
    text = str(gm.graph)
    result, _ = run(gm, [UnstackExperts(parameters=("stack",))])
    assert str(gm.graph) == text
    ours, theirs = (torch.utils._pytree.tree_leaves(m(x=_x(1)))[0] for m in (result, gm))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert unstacked_as(result) == {"stack": transposed}
    assert {call.name for call in linear_calls(result)} <= {f"stack.{e}" for e in range(E)}
    assert not [n for n in result.graph.nodes if n.op == "get_attr" and n.target == "stack"]
    whole = dict(gm.named_parameters())["stack"]
    for call in linear_calls(result):
        matrix = whole[int(call.name.rpartition(".")[2])]
        assert call.weight_OI.shape == (O, I)
        assert call.weight_OI.data_ptr() == matrix.data_ptr()  # nothing is copied
        assert call.weight_OI.requires_grad


@pytest.mark.parametrize("multiply", OTHERS.values(), ids=OTHERS)
def test_what_is_no_linear_for_each_expert_is_left(multiply: Multiply) -> None:
    assert not stacks(_graph(multiply, (E, O, I), "fx"))


@pytest.mark.parametrize("join", ["add_", "add", "mul_", "mul", "sub_"])
def test_only_what_is_added_in_place_is_the_bias_of_a_routed_product(join: str) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(E, I, O, dtype=torch.float64))
            self.stack_bias = nn.Parameter(torch.randn(E, O, dtype=torch.float64))

        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            y = torch.matmul(x.unsqueeze(1), self.stack[wanted]).squeeze(1)
            joined: Tensor = getattr(y, join)(self.stack_bias[wanted])
            return joined

    torch.manual_seed(0)
    given = (_x(1)[0], torch.tensor([2, 0, 2, 2, 0, 0, 2]))
    gm = capture(Biased(), given, mode="fx").graph
    (stack,) = stacks(gm)["stack"]
    assert stack.bias == ("stack_bias" if join == "add_" else None)
    result, _ = run(gm, [UnstackExperts(parameters=("stack",))])
    torch.testing.assert_close(result(*given), gm(*given), rtol=1e-12, atol=1e-12)


class Runs(nn.Module):
    def __init__(self, dtype: torch.dtype, *, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed = transposed
        shape = (E, 16, 32) if transposed else (E, 32, 16)
        self.stack = nn.Parameter(torch.randn(shape).to(dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        w = self.stack if self.transposed else self.stack.mT
        return F.grouped_mm(x, w, offs=ends)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_rows_become_linears(dtype: torch.dtype, transposed: bool) -> None:
    x = torch.randn(12, 16).to(dtype)
    ends = torch.tensor([5, 5, 10], dtype=torch.int32)  # none for 1, and two rows are nobody's
    gm = capture(Runs(dtype, transposed=transposed), (x, ends), mode="fx").graph
    result, _ = run(gm, [UnstackExperts(parameters=("stack",))], expect={"unstack-experts": 1})
    assert unstacked_as(result) == {"stack": transposed}
    ours, theirs = result(x=x, ends=ends), gm(x=x, ends=ends)
    assert ours.shape == theirs.shape
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=rtol, atol=16 * rtol)
