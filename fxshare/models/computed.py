"""Weights that a module computes anew in every call, or fetches: what does so, and how to end it.

Such a weight is no parameter: rewriting it would freeze what the mechanism goes on changing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

_LEGACY: Mapping[str, str] = {
    "torch.nn.utils.weight_norm.WeightNorm": "weight_norm",
    "torch.nn.utils.spectral_norm.SpectralNorm": "spectral_norm",
}
_ACCELERATE = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def computed(module: nn.Module) -> str | None:
    """What computes tensors of a module, and the call that ends it; None for nothing.

    Pruning masks, ``torch.nn.utils.weight_norm`` and ``spectral_norm``, and parametrizations.
    """
    for hook in module._forward_pre_hooks.values():
        path = f"{type(hook).__module__}.{type(hook).__qualname__}"
        name = getattr(hook, "name", "weight")
        if path in _LEGACY:
            return (
                f"its {name} is not a parameter but computed (torch.nn.utils.{_LEGACY[path]}); "
                f"call torch.nn.utils.remove_{_LEGACY[path]}(module, {name!r}) first"
            )
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            return (
                f"its {name} is not a parameter but computed (a pruning mask of "
                f"torch.nn.utils.prune); call torch.nn.utils.prune.remove(module, {name!r}) first, "
                "which writes the zeros into it"
            )
    if parametrize.is_parametrized(module):
        parametrizations = module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        name, made = next(iter(parametrizations.items()))
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in made.children())
        return (
            f"its {name} is not a parameter but computed (torch.nn.utils.parametrize: {kinds}); "
            f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) first"
        )
    return None


def placed_by_accelerate(module: nn.Module) -> str | None:
    """That accelerate has put a hook on a module, and the call that takes it off; None if not."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return None
    return f"has accelerate's {type(hook).__name__}, which moves tensors; call {_ACCELERATE} first"


def offloaded(model: nn.Module) -> str | None:
    """The first module whose weights accelerate fetches when it is called, and the way out; None
    where all of them are there."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = [hook, *getattr(hook, "hooks", ())]
        if any(getattr(each, "offload", False) for each in hooks):
            return (
                f"the weights of module {name!r} are offloaded by accelerate's "
                f"{type(hook).__name__}, which fetches them in every call; call {_ACCELERATE}, "
                "which loads them, or load the model without device_map"
            )
    return None


def uncopied(model: nn.Module) -> Iterator[str]:
    """Why ``copy.deepcopy`` of a model may fail, by module: computed tensors are no leaves."""
    for name, module in model.named_modules():
        reason = computed(module)
        held = [value for value in vars(module).values() if isinstance(value, Tensor)]
        if reason is not None and not all(tensor.is_leaf for tensor in held):
            yield f"module {name!r}: {reason}"


def stateful(model: nn.Module) -> str | None:
    """The first parametrized module in training mode that changes itself whenever its weight is
    read (``spectral_norm``), and the way out; None where there is none."""
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parts = module.parametrizations
        assert isinstance(parts, nn.ModuleDict)
        if any(_changes(part) for part in parts.values()):
            return (
                f"module {name!r} is in training mode, where each reading of its weight changes "
                f"it: {computed(module)}, or compile in eval mode (model.eval())"
            )
    return None


def _changes(made: nn.Module) -> bool:
    if not any(part.training and part._buffers for part in made.modules()):
        return False
    copied = copy.deepcopy(made)
    before = [buffer._version for buffer in copied.buffers()]
    with torch.no_grad():
        copied()
    return before != [buffer._version for buffer in copied.buffers()]


__all__ = ["computed", "offloaded", "placed_by_accelerate", "stateful", "uncopied"]
