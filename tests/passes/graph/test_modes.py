"""What a graph says of its modes."""

from __future__ import annotations

import torch
from torch import fx

from passes.graph.modes import caller_modes, cast_dtypes, is_steered, set_modes


def test_the_dtypes_of_regions_under_autocast_are_those_of_their_nodes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    caller = graph.call_function(caller_modes)
    y = graph.call_method("to", (x, torch.float64))
    assert (is_steered(graph), cast_dtypes(graph)) == (False, set())
    casts = (("cpu", True, torch.bfloat16), ("cuda", True, torch.float16))
    graph.call_function(set_modes, (caller, None, casts))
    z = graph.call_method("relu", (y,))
    graph.call_function(set_modes, (caller,))
    graph.output(z)
    assert is_steered(graph)
    assert cast_dtypes(graph) == {torch.bfloat16, torch.float16}
