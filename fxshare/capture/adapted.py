"""Copies of a model set to implementations that can be traced; the caller's stays as it is.

transformers picks the code for attention and for experts by a name in the configuration. Some of
that code no graph can hold: FlashAttention's own kernels, the loop of ``eager`` experts, whose
length depends on the data, and ``grouped_mm``, which torch can evaluate without values in bfloat16
only. The configuration belongs to the copy, so there is nothing to put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.graph.graph import structure_copy

_ATTENTION, _EXPERTS = "_attn_implementation", "_experts_implementation"
_TRACEABLE = {_ATTENTION: ("eager", "sdpa"), _EXPERTS: ("batched_mm",)}
_INSTEAD = {_ATTENTION: "sdpa", _EXPERTS: "batched_mm"}
_WHAT = {_ATTENTION: "attention", _EXPERTS: "experts"}


@dataclass(frozen=True)
class Adapted:
    """``reference`` is what a graph is compared with, ``traced`` what it is made from. Either is
    the model itself where nothing stands in the way."""

    reference: nn.Module
    traced: nn.Module
    notes: tuple[str, ...]


def adapt(model: nn.Module) -> Adapted:
    """Choose what can be traced, and say what was chosen."""
    reference, attention = _set(model, (_ATTENTION,))
    traced, experts = _set(reference, (_EXPERTS,))
    notes = [*attention, *experts]
    if any(_checkpoints(module) for module in traced.modules()):
        traced = structure_copy(traced)
        for module in traced.modules():
            if _checkpoints(module):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        notes.append(
            "gradient checkpointing is not part of the graph: use torch.utils.checkpoint around it"
        )
    return Adapted(reference, traced, tuple(notes))


def runnable(model: nn.Module) -> nn.Module:
    """The model, or a copy with another attention where its own cannot run everywhere."""
    return _set(model, (_ATTENTION,))[0]


def _set(model: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, list[str]]:
    found = {
        (name, str(getattr(config, name)))
        for config in _configs(model)
        for name in names
        if _needs_another(model, config, name)
    }
    if not found:
        return model, []
    copy = structure_copy(model)
    for config in _configs(copy):
        for name in names:
            if _needs_another(copy, config, name):
                setattr(config, name, _INSTEAD[name])
    return copy, [
        f"{_WHAT[name]} {was!r} cannot be traced: the graph has {_INSTEAD[name]!r} (the model "
        "keeps its own)"
        for name, was in sorted(found)
    ]


def _needs_another(model: nn.Module, config: object, name: str) -> bool:
    value = getattr(config, name, None)
    if name == _EXPERTS and not any(_holds_experts(module) for module in model.modules()):
        return False
    return isinstance(value, str) and value not in _TRACEABLE[name]


def _holds_experts(module: nn.Module) -> bool:
    # what transformers puts on the classes whose experts it dispatches; convolutions are 3-D too
    stacked = any(p.ndim == 3 for p in module._parameters.values() if p is not None)
    return stacked and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True
