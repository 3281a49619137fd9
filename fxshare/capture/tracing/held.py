"""Leaves that stay in a mode of their own, whatever ``train`` is told: frozen normalisation."""

from __future__ import annotations

from torch import fx

from fxshare.capture.tracing.align import StructureDiffers
from fxshare.capture.tracing.tracer import TRAINING


def held_modes(graph: fx.Graph, trained: fx.Graph | None) -> dict[str, tuple[bool, bool]]:
    """The leaf modules, and those in them, that were called in another mode than the model's own,
    with their modes in eval and in training; ``trained`` is the trace in training mode.

    Raises :class:`StructureDiffers` for one that is called in two modes.
    """
    found: dict[str, tuple[bool, bool]] = {}
    others = graph.nodes if trained is None else trained.nodes
    for node, twin in zip(graph.nodes, others, strict=True):
        evaluated = node.meta.get(TRAINING, {})
        training = (
            dict.fromkeys(evaluated, True) if trained is None else twin.meta.get(TRAINING, {})
        )
        for name, mode in evaluated.items():
            both = mode, training[name]
            if found.setdefault(name, both) != both:
                raise StructureDiffers(
                    f"module {name!r} is called in training mode and in eval mode"
                )
    return {name: both for name, both in found.items() if both != (False, True)}
