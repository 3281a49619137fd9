"""Weights that are not the model's own to compress: parts of adapters, and computed ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from fxshare.models.computed import computed
from fxshare.proposing.weights import Weight

_LORA = re.compile(r"lora_[A-Za-z]\w*")
_MERGE = "one of weights can be merged first (peft: model = model.merge_and_unload())"


def set_apart(
    model: nn.Module, groups: Sequence[list[Weight]]
) -> tuple[list[list[Weight]], list[tuple[list[Weight], str]]]:
    """The groups without the weights that are left as they are, and those with the reason."""
    kept: list[list[Weight]] = []
    apart: list[tuple[list[Weight], str]] = []
    for group in groups:
        reasons = {weight.name: _reason(model, weight.name) for weight in group}
        own = [weight for weight in group if reasons[weight.name] is None]
        if own:
            kept.append(own)
        for reason in dict.fromkeys(r for r in reasons.values() if r is not None):
            apart.append(([w for w in group if reasons[w.name] == reason], reason))
    return kept, apart


def _reason(model: nn.Module, name: str) -> str | None:
    for owner, step in _steps(model, name):
        kinds = {cls.__name__: cls.__module__ for cls in type(owner).__mro__}
        if "BaseTuner" in kinds:  # the whole model with its adapters
            continue
        in_adapter = any(home.startswith("peft.tuners.") for home in kinds.values())
        if _LORA.fullmatch(step) or (in_adapter and step != "base_layer"):
            return f"is part of an adapter, small by design; {_MERGE}"
        if "AuxiliaryTrainingWrapper" in kinds and step == "original_module":
            return f"has an adapter's copy in its place (modules_to_save); {_MERGE}"
    try:
        return computed(model.get_submodule(name))
    except AttributeError:  # a bare parameter
        return None


def _steps(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Each module on the way to a weight, with the step that is taken from there."""
    at: object = model
    for step in name.split("."):
        if not isinstance(at, nn.Module):
            return
        yield at, step
        at = getattr(at, step, None)


__all__ = ["set_apart"]
