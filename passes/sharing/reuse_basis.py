"""Compute each basis product once per distinct input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import calls_by_target
from passes.graph.slices import slices
from passes.graph.writes import Written


@dataclass(frozen=True)
class ReuseBasis(Pass):
    """Readers of the same input and the same basis read the same product.

    Before::

        z0 = self.basis_qk(x);  q = self.q_proj(z0)
        z1 = self.basis_qk(x);  k = self.k_proj(z1)

    After::

        z0 = self.basis_qk(x);  q = self.q_proj(z0);  k = self.k_proj(z0)

    An input or product that some node writes into in place is left alone.
    """

    name: ClassVar[str] = "reuse-basis"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        bases = {place.basis for place in slices(gm).values()}
        written = Written()
        count = 0
        for target, nodes in calls_by_target(gm, lambda m: isinstance(m, nn.Linear)).items():
            if target not in bases:
                continue
            first: dict[fx.Node, fx.Node] = {}
            for node in nodes:
                x = node.args[0]
                assert isinstance(x, fx.Node)
                if written[x] or written[node]:
                    continue
                original = first.setdefault(x, node)
                if original is node:
                    continue
                node.replace_all_uses_with(original)
                gm.graph.erase_node(node)
                count += 1
        return count
