"""The structure of a transformers model, without values: what ``generate`` is made from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passes import Pass
from passes.graph.graph import ModuleT, structure_copy

_KEY = "structure"


@dataclass(eq=False)
class Structure:
    """``model`` is the original without values (meta device), ``passes`` what rewrote it beside the
    default ones. ``made`` is what generation derived from them, and is not copied."""

    model: Any
    passes: tuple[Pass, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        # the two configurations are the user's to change, each copy for itself
        return Structure(_with_own_configs(self.model), self.passes)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "passes": self.passes, "made": {}}


def _with_own_configs(model: nn.Module) -> nn.Module:
    result = copy.copy(model)
    result.__dict__ = dict(model.__dict__)
    for name in ("config", "generation_config"):
        if name in result.__dict__:
            result.__dict__[name] = copy.deepcopy(result.__dict__[name])
    return result


def keep_structure(result: nn.Module, model: nn.Module, passes: Sequence[Pass]) -> None:
    """Put the structure of ``model``, if it is one of transformers, where :func:`structure_of`
    finds it."""
    if _is_pretrained(model):
        kept = Structure(without_values(model).eval(), tuple(passes))
        result.__dict__.setdefault("meta", {})[_KEY] = kept


def structure_of(gm: nn.Module) -> Structure | None:
    """The structure of the model that ``gm`` was made from; None unless transformers made it."""
    found: Structure | None = getattr(gm, "meta", {}).get(_KEY)
    return found


def without_values(
    model: ModuleT,
    named: Mapping[str, Tensor] | None = None,
    empty: Callable[[str, Tensor], Tensor] = lambda name, tensor: torch.empty_like(
        tensor, device="meta"
    ),
) -> ModuleT:
    """A copy in which ``empty`` made the tensors ``named``, by default all parameters and buffers,
    and on the meta device. Ties stay ties, under the first of their names."""
    if named is None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    memo: dict[int, object] = {}
    for name, tensor in named.items():
        if id(tensor) not in memo:
            made = empty(name, tensor)
            if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
    return structure_copy(model, memo=memo)


def frozen_in(model: nn.Module) -> tuple[str, ...]:
    """The parameters that take no gradient, each by the first of its names."""
    return tuple(name for name, p in model.named_parameters() if not p.requires_grad)


def freeze(model: nn.Module, names: Container[str]) -> None:
    """Let the parameters ``names`` take no gradient, and all others one."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in names)


def tensors_by_name(gm: nn.Module, structure: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``gm``, also by the names that only ``structure`` has for them:
    torch.export keeps one name of a tied weight."""
    found: dict[str, Tensor] = dict(gm.named_parameters(remove_duplicate=False))
    found.update(gm.named_buffers(remove_duplicate=False))
    by_object: dict[int, str] = {}
    named = list(structure.named_parameters(remove_duplicate=False))
    for name, tensor in named:
        if name in found:
            by_object.setdefault(id(tensor), name)
    for name, tensor in named:
        if name not in found and id(tensor) in by_object:
            found[name] = found[by_object[id(tensor)]]
    return found


def _is_pretrained(model: nn.Module) -> bool:
    # by name: whoever has no such model must not pay for the import of transformers
    return any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)


__all__ = [
    "Structure",
    "freeze",
    "frozen_in",
    "keep_structure",
    "structure_of",
    "tensors_by_name",
    "without_values",
]
