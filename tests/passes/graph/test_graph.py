"""Which modules count as linears."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.graph.graph import is_linear


class Spelt(nn.Linear):
    """A linear with a ``forward`` of its own, as ``FalconLinear``."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


class ScaledInTraining(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) * (2 if self.training else 1)


class Flat(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).flatten()


class Raises(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("never")


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_in_other_words_is_one(bias: bool) -> None:
    module = Spelt(4, 3, bias=bias)
    before = torch.random.get_rng_state()
    assert is_linear(module)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", [Scaled, ScaledInTraining, Flat, Raises])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_computes_something_else_is_none(kind: type[nn.Linear], bias: bool) -> None:
    assert not is_linear(kind(4, 3, bias=bias).eval())


def test_a_linear_in_other_words_that_holds_more_is_none() -> None:
    module = Spelt(4, 3)
    module.register_buffer("scale", torch.ones(3))
    assert not is_linear(module)
    module = Spelt(4, 3)
    module.drop = nn.Dropout()
    assert not is_linear(module)
