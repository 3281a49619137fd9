"""What the modules of a model hold, to be put back after a trace."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

_MOVES = frozenset({"to", "cpu", "cuda", "contiguous", "detach"})


class Kept:
    """The attributes and buffers of every module of ``root``, as they were."""

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (f"{name}." if name else "", place, dict(place), place is module._buffers)
            for name, module in root.named_modules()
            for place in (vars(module), module._buffers)
        ]

    def restore(self) -> str | None:
        """Put back what ``forward`` replaced by a traced value; the name of a buffer that was
        replaced by another than itself on another device or in another dtype. What is no buffer,
        such as the attention weights of the last call, is the model's to forget."""
        replaced = None
        for prefix, place, before, is_state in self._before:
            for name in [n for n, value in place.items() if isinstance(value, fx.Proxy)]:
                if is_state and not _is_moved(place[name].node):
                    replaced = f"{prefix}{name}"
                if name in before:
                    place[name] = before[name]
                else:
                    del place[name]
        return replaced


def _is_moved(node: Any) -> bool:
    """Whether a node is a stored tensor, moved or cast at most."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _MOVES:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


__all__ = ["Kept"]
