"""A hash over the text of every graph in a compiled model."""

from __future__ import annotations

import hashlib
import re

from torch import fx, nn

from fxshare.capture.guards import hold_guard

# Nodes name our own functions by their modules. These names stand in the hashes of folders that
# people have, so a function that moves keeps here the name it had.
_NAMES_IN_FOLDERS = {"passes.sharing.unstack_experts.": "passes.unstack_experts."}


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
        for here, in_folders in _NAMES_IN_FOLDERS.items():
            line = line.replace(here, in_folders)
        lines.append(re.sub(r"0x[0-9a-f]+", "0x", line))
    return "\n".join(lines)
