"""DropCats: what is no split of one tensor stays concatenated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from passes import DropCats, run

Made = Callable[[Tensor, Tensor], Tensor]
LEFT: dict[str, Made] = {
    "inputs": lambda x, y: torch.cat([x, y], dim=-1),
    "parts of other things": lambda x, y: torch.cat(
        [torch.split(x, [2, 4], dim=-1)[0], torch.split(y, [2, 4], dim=-1)[1]], dim=-1
    ),
    "in another order": lambda x, y: torch.cat(
        [(parts := torch.split(x, [2, 4], dim=-1))[1], parts[0]], dim=-1
    ),
    "not all": lambda x, y: torch.cat(
        [(parts := torch.split(x, [2, 2, 2], dim=-1))[0], parts[1]], dim=-1
    ),
    "another dimension": lambda x, y: torch.cat(
        [(parts := torch.split(x, [1, 1], dim=0))[0], parts[1]], dim=-1
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    gm = fx.symbolic_trace(LEFT[name])
    result, (applied,) = run(gm, [DropCats()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(gm.graph)


def test_the_parts_of_a_split_in_order_are_what_was_split() -> None:
    def made(x: Tensor) -> Tensor:
        parts = torch.split(x, [2, 4], dim=-1)
        return torch.cat([parts[0], parts[1]], dim=-1).neg()

    result, (applied,) = run(fx.symbolic_trace(made), [DropCats()])
    assert applied.rewrites == 1
    x = torch.randn(2, 6)
    assert torch.equal(result(x), -x)
    assert [n.op for n in result.graph.nodes] == ["placeholder", "call_method", "output"]
