"""Hooks that no graph runs: what they hang on is not called in it."""

from __future__ import annotations

from torch import fx, nn

from fxshare.capture.steered import SteeringDiffers


def refuse_lost_hooks(model: nn.Module, gm: fx.GraphModule) -> None:
    """Refuse a graph that would drop backward hooks: those of modules that are not called as a
    whole. Forward hooks of modules inside are traced with them; those of the model itself, which
    the graph replaces, are told by :func:`fxshare.capture.example.hooks_of` before.

    Raises :class:`SteeringDiffers` naming the module and the way out.
    """
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for name, module in model.named_modules():
        parts = name.split(".")
        whole = any(".".join(parts[:end]) in called for end in range(1, len(parts) + 1))
        if not whole and (module._backward_hooks or module._backward_pre_hooks):
            what = f"module {name!r}" if name else f"the model itself ({type(model).__name__})"
            raise SteeringDiffers(
                f"{what} has backward hooks, which a graph of the operations inside it would drop; "
                "remove them, or use capture='modules', which calls the model's own modules"
            )
