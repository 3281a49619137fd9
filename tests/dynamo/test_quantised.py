"""Codes under a compiler. Not with the tests of ``base``: a compiler's threads stay,
and some of those are about a process that has none."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import nn

from fxshare.base.randomness import randomness_as_before
from tests.base.test_quantised import made
from tests.base.test_randomness import wait_for_workers


def _compiled(of: int, width: int) -> tuple[nn.Linear, Any]:
    linear = nn.Linear(width, 6)
    linear.weight = nn.Parameter(made(of, width), requires_grad=False)
    torch._dynamo.reset()
    return linear, torch.compile(linear)


@pytest.mark.parametrize(
    ("of", "width"),
    [(8, 48), (4, 48), (4, 128), (8, 33)],  # codes by words or bytes, of 4 bits in whole groups
)
def test_a_compiler_gets_the_same_numbers_for_one_row_and_for_several(of: int, width: int) -> None:
    linear, compiled = _compiled(of, width)
    weight: Any = linear.weight
    for rows in (1, 3):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
        expected = nn.functional.linear(x, weight.values(), linear.bias)
        with torch.no_grad():
            gap = (compiled(x) - expected).abs().max()
        assert gap <= 1e-5 * expected.abs().max()


def test_a_compilers_threads_keep_no_generator_from_being_as_it_was() -> None:
    with torch.no_grad():  # which the test above has left in Inductor's cache
        _compiled(4, 48)[1](torch.randn(1, 48))
    assert threading.active_count() > 1
    wait_for_workers()
    before = random.getstate()
    with randomness_as_before(seed=1):
        random.random()
    assert random.getstate() == before
