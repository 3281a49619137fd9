"""A hash over the text of every graph in a compiled model."""

from __future__ import annotations

import hashlib
import re

from torch import fx, nn

from fxshare.capture.guards import hold_guard


def graph_sha256(module: nn.Module) -> str:
    """A hash over the text of every graph in a compiled model.

    Where in the model's source a guard arose is left out: lines move from one release to the next.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        if isinstance(part, fx.GraphModule):
            digest.update(f"{name}\n{_graph_text(part.graph)}".encode())
    return digest.hexdigest()


def _graph_text(graph: fx.Graph) -> str:
    lines = []
    for node in graph.nodes:
        line = node.format_node() or ""
        if node.target is hold_guard:
            line = line.replace(str(node.args[2]), "")
        lines.append(re.sub(r"0x[0-9a-f]+", "0x", line))
    return "\n".join(lines)
