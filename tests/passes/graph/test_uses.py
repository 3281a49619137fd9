"""Which nodes' numbers reach an output."""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.graph.uses import used_nodes


def test_a_write_into_a_view_of_what_is_given_back_is_used() -> None:
    """And so is what it writes; a write into a tensor that nothing gives back is not."""
    graph = fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    base = graph.call_method("clone", (x,))
    row = graph.call_function(operator.getitem, (base, 0))
    written = graph.call_method("add_", (row, y))
    lost = graph.call_method("add_", (graph.call_method("clone", (z,)), y))
    graph.output(base)
    used = used_nodes(graph)
    assert {x, y, base, row, written} <= used
    assert not {z, lost} & used


def test_a_result_written_by_out_is_used_where_its_memory_is() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    base = graph.call_method("clone", (x,))
    added = graph.call_function(torch.add, (y, 1), {"out": base})
    graph.output(base)
    assert {x, y, base, added} <= used_nodes(graph)


def test_who_reads_a_shape_only_does_not_use_the_numbers() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(getattr, (x, "shape")), graph.call_method("neg", (y,))))
    used = used_nodes(graph)
    assert x not in used
    assert y in used
