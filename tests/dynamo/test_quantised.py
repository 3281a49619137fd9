"""Codes under a compiler. Not with the tests of ``base``: a compiler's threads stay,
and some of those are about a process that has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.base.test_quantised import made


@pytest.mark.parametrize(
    ("of", "width"),
    [(8, 48), (4, 48), (4, 128), (8, 33)],  # codes by words or bytes, of 4 bits in whole groups
)
def test_a_compiler_gets_the_same_numbers_for_one_row_and_for_several(of: int, width: int) -> None:
    weight = made(of, width)
    linear = nn.Linear(width, 6)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(linear)
    for rows in (1, 3):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
        expected = nn.functional.linear(x, weight.values(), linear.bias)
        with torch.no_grad():
            gap = (compiled(x) - expected).abs().max()
        assert gap <= 1e-5 * expected.abs().max()
