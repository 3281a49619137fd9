"""Leaves that stay in a mode of their own, whatever ``train`` is told: frozen normalisation."""

from __future__ import annotations

from torch import fx, nn

from fxshare.capture.tracing.align import StructureDiffers

_TRAINING = "training"  # where the meta of a leaf's call has the modes of the modules in the leaf


def note_modes(node: fx.Node, module: nn.Module) -> None:
    """Note at the call of a leaf what the model's own ``train`` or ``forward`` made of its mode."""
    if _TRAINING not in node.meta:  # a container hands on what its last leaf gave
        parts = module.named_modules(prefix=str(node.target))
        node.meta[_TRAINING] = {name: part.training for name, part in parts}


def held_modes(graph: fx.Graph, trained: fx.Graph | None) -> dict[str, tuple[bool, bool]]:
    """The leaf modules, and those in them, that were called in another mode than the model's own,
    with their modes in eval and in training; ``trained`` is the trace in training mode.

    Raises :class:`StructureDiffers` for one that is called in two modes.
    """
    found: dict[str, tuple[bool, bool]] = {}
    others = graph.nodes if trained is None else trained.nodes
    for node, twin in zip(graph.nodes, others, strict=True):
        evaluated = node.meta.get(_TRAINING, {})
        training = (
            dict.fromkeys(evaluated, True) if trained is None else twin.meta.get(_TRAINING, {})
        )
        for name, mode in evaluated.items():
            both = mode, training[name]
            if found.setdefault(name, both) != both:
                raise StructureDiffers(
                    f"module {name!r} is called in training mode and in eval mode"
                )
    return {name: both for name, both in found.items() if both != (False, True)}
