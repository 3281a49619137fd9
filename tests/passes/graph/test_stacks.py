"""Which nodes take a matrix of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn

from passes import stacks
from passes.graph.forms import One

_aten = torch.ops.aten


def _taken_at_aten_level(bounds: Sequence[int]) -> fx.GraphModule:
    """A linear by what a slice takes of three matrices, in the words of torch.export."""
    root = nn.Module()
    root.stack = nn.Parameter(torch.zeros(3, 4, 5))
    graph = fx.Graph()
    x = graph.placeholder("x")
    taken = graph.call_function(_aten.slice.Tensor, (graph.get_attr("stack"), *bounds))
    matrix = graph.call_function(_aten.squeeze.dim, (taken, 0))
    graph.output(graph.call_function(_aten.linear.default, (x, matrix)))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(("bounds", "number"), [((0, 1, 2), 1), ((0, -1, 2**63 - 1), 2)])
def test_a_slice_of_one_matrix_is_that_matrix(bounds: Sequence[int], number: int) -> None:
    (found,) = stacks(_taken_at_aten_level(bounds))["stack"]
    assert found.form == One(number)
    assert not found.transposed


@pytest.mark.parametrize("bounds", [(0, 0, 2), (0, 0, 3, 2), (1, 1, 2)])
def test_a_slice_of_several_matrices_or_of_rows_is_none(bounds: Sequence[int]) -> None:
    assert not stacks(_taken_at_aten_level(bounds))
