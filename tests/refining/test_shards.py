"""Which parameters can be divided between processes; ``test_processes.py`` has them divided."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxshare.refining.shards import owners_of


class Reads(nn.Module):
    """Linears that are called, and others that FSDP's hooks are not around, or are undone for."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.again, self.by_hand = (nn.Linear(4, 4) for _ in range(3))
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.written, self.through_a_view = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.again(self.again(self.plain(x)))
        x = torch.nn.functional.linear(self.by_hand(x), self.by_hand.weight)
        x = self.other(self.one(x)) + self.written(x).relu_()
        y = self.through_a_view(x)
        y.transpose(0, 1).mul_(2)
        return x + y


def test_what_is_called_and_not_written_into() -> None:
    gm = fx.symbolic_trace(Reads())
    weights = {n: p for n, p in gm.named_parameters() if n.endswith("weight")}
    found = owners_of(gm, weights)
    assert [*found.values()] == [{"plain.weight": "weight"}, {"again.weight": "weight"}]
    assert [*found] == [gm.plain, gm.again]
    assert owners_of(gm, {"plain.bias": gm.plain.bias}) == {gm.plain: {"plain.bias": "bias"}}
