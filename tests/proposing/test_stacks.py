"""Stacks of matrices are offered by what is done with them, whatever they are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxshare
from tests.strategies import no_warnings_of_ours

WIDTH, HIDDEN, COUNT, VOCABULARY = 8, 24, 4, 20
Read = Callable[["Mixture", Tensor, Tensor], Tensor]


class Mixture(nn.Module):
    """A mixture whose names say nothing; ``read`` takes tokens ``(S, I)`` and shares ``(S, E)``."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN) / 3)
        self.w_out = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH) / 5)
        self.choice = nn.Linear(WIDTH, COUNT)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        shares = self.choice(x).softmax(-1)
        return self.read(self, x.flatten(0, 1), shares.flatten(0, 1)).view_as(x)


class Model(nn.Module):
    def __init__(self, read: Read) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Mixture(read) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def _multiplied(m: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    y = torch.bmm(torch.bmm(x.expand(COUNT, -1, -1), m.w_in).relu(), m.w_out)
    return (y * shares.t().unsqueeze(-1)).sum(0)


def _contracted(m: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    y = torch.einsum("enh,ehd->end", torch.einsum("nd,edh->enh", x, m.w_in).relu(), m.w_out)
    return torch.einsum("end,ne->nd", y, shares)


def _gathered(m: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    chosen = shares.argmax(-1)
    return (x.unsqueeze(1) @ m.w_in[chosen]).relu().matmul(m.w_out[chosen]).squeeze(1)


def _in_one(m: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    y = torch.einsum("nd,edh->neh", x, m.w_in).relu()
    return torch.einsum("neh,ehd,ne->nd", y, m.w_out, shares)


def _model(read: Read) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(read).eval()


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", [None, _ids()], ids=["names", "graph"])
@pytest.mark.parametrize("read", [_multiplied, _contracted, _gathered])
def test_stacks_without_a_telling_name_are_offered(read: Read, example: Tensor | None) -> None:
    model = _model(read)
    found = fxshare.propose(model, example=example)
    assert {t.name: t.sites for t in found.types} == {"w_in": 2 * COUNT, "w_out": 2 * COUNT}
    assert "chooses among 4 experts" in found.left_out[0].reason
    with no_warnings_of_ours():
        gm = fxshare.compile(model, found.config, example=_ids())
    assert len(gm.fxshare.plan.sites) == 4 * COUNT
    assert gm.fxshare.plan.skipped == ()
    torch.testing.assert_close(gm(_ids()), model(_ids()), rtol=1e-4, atol=1e-5)


def test_a_stack_in_a_product_of_three_is_left_out_by_its_node() -> None:
    found = fxshare.propose(_model(_in_one), example=_ids())
    assert [t.name for t in found.types] == ["w_in"]
    (reason,) = (one.reason for one in found.left_out if "w_out" in one.name)
    assert reason == "its stack is not read as one linear for each matrix (node 'einsum_1')"


def test_a_graph_shows_a_stack_that_stands_alone() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.mixing = nn.ParameterList(torch.randn(COUNT, WIDTH, HIDDEN) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer, stack in zip(self.layers, self.mixing, strict=True):
                x = x + torch.bmm(layer(x).expand(COUNT, -1, -1), stack).sum(0)[:, :WIDTH]
            return x

    model, x = Alone().eval(), torch.randn(5, WIDTH)
    assert [t.name for t in fxshare.propose(model).types] == ["layers"]
    found = fxshare.propose(model, example=x)
    assert {t.name: t.sites for t in found.types} == {"layers": 2, "mixing": 2 * COUNT}


def test_heads_in_a_third_dimension_are_no_stack() -> None:
    class Heads(nn.Module):
        """XLNet's: q, k and what leads back, all (width, heads, head width)."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = (nn.Parameter(torch.randn(WIDTH, 2, 4)) for _ in range(3))
            self.mixing = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (torch.einsum("bti,inh->btnh", x, w) for w in (self.q, self.k))
            return self.mixing(torch.einsum("btnh,inh->bti", q * k, self.o))

    model = nn.Sequential(Heads(), Heads()).eval()
    for example in (None, torch.randn(2, 5, WIDTH)):
        found = fxshare.propose(model, example=example)
        assert all("mixing" in t.spec.pattern for t in found.types)
