"""Remove what rewriting left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import Pass
from passes.graph.uses import is_impure


@dataclass(frozen=True)
class CleanUp(Pass):
    """Erase nodes that nothing reads, and modules and tensors that no node uses.

    Before::

        weight = self.h.0.c_attn.weight               # nothing reads it any more
        y = self.h.0.q(x)

    After::

        y = self.h.0.q(x)

    Kept although nothing reads them: placeholders, guards that raise, nodes that write in place
    (fx alone would drop ``x.add_(1)`` and ``nn.ReLU(inplace=True)``), and methods that no tensor
    has (``cache.reset()`` changes an object that is not ours).
    """

    name: ClassVar[str] = "clean-up"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code(is_impure_node=is_impure)
        gm.delete_all_unused_submodules()
        _delete_unread_tensors(gm)
        return before - len(gm.graph.nodes)


def _delete_unread_tensors(gm: fx.GraphModule) -> None:
    """Beside the slices of an exported linear the whole weight would stay in the state dict."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for path, module in gm.named_modules(remove_duplicate=False):
        parts = path.split(".") if path else []
        prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        if prefixes & (called | read):
            continue
        for name in (*module._parameters, *module._buffers):
            if (f"{path}.{name}" if path else name) not in read:
                delattr(module, name)
