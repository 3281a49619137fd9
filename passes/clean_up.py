"""Remove what rewriting left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import Pass
from passes.graph import is_in_place


@dataclass(frozen=True)
class CleanUp(Pass):
    """Erase nodes that nothing reads, and modules that no node calls.

    Before::

        weight = self.h.0.c_attn.weight               # nothing reads it any more
        y = self.h.0.q(x)

    After::

        y = self.h.0.q(x)

    Nodes that write in place, raise, or take a placeholder's name are kept: fx alone would drop
    ``x.add_(1)`` when its result is not read.
    """

    name: ClassVar[str] = "clean-up"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code(
            is_impure_node=lambda node: node.is_impure() or is_in_place(node)
        )
        gm.delete_all_unused_submodules()
        return before - len(gm.graph.nodes)
