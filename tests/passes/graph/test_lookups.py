"""Which nodes look rows up."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from passes.graph.lookups import lookups


def test_what_multiplies_by_a_weight_looks_nothing_up() -> None:
    """Although it reads a matrix, and a node after it, as a lookup does."""
    root = nn.Module()
    root.weight = nn.Parameter(torch.zeros(5, 4))
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    row = graph.call_function(F.embedding, (x, weight))
    product = graph.call_function(torch.matmul, (weight, x))
    method = graph.call_method("index_select", (weight, x))
    graph.output((row, product, method))
    (found,) = lookups(fx.GraphModule(root, graph))
    assert (found.node, found.ids, found.padding_idx) == (row, x, None)
