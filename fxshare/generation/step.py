"""The calls of a model that a generation loop makes, told apart by what decides about the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from fxshare.capture.call import MASK

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Values: TypeAlias = "dict[str, Any]"
"""Arguments of one call by name; an argument that is a dictionary is one for each of its entries,
``attention_mask__full_attention``."""

CACHE = "past_key_values"
# by name, because only these are known to be told apart by their class and their layers
_CACHES = ("DynamicCache", "StaticCache")
_LITERALS = (bool, int, float, str)


@dataclass(frozen=True)
class Kind:
    """What decides which graph a call needs: which tensors it gives, constants, and the cache."""

    tensors: tuple[tuple[str, int, torch.dtype], ...]
    constants: tuple[tuple[str, Any], ...]
    cache: tuple[type, tuple[str, ...]]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the graph, in order."""
        return (*(name for name, _, _ in self.tensors), CACHE)

    @property
    def logits(self) -> int:
        """Positions, from the last one back, whose logits the call wants; 0 is all."""
        return int(dict(self.constants).get("logits_to_keep", 0))

    def __str__(self) -> str:
        given = ", ".join(f"{name} ({ndim}-d)" for name, ndim, _ in self.tensors)
        return f"a step with {given} and a {self.cache[0].__name__}"


def flat(arguments: Mapping[str, Any]) -> Values:
    """The arguments that are given, those in dictionaries one by one."""
    found: Values = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            found.update({f"{name}__{key}": v for key, v in value.items() if v is not None})
        elif value is not None:
            found[name] = value
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flat`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        outer, inside, key = name.partition("__")
        if inside:
            result.setdefault(outer, {})[key] = value
        else:
            result[name] = value
    return result


def with_mask(values: Values) -> Values:
    """The call with a mask of ones where none is given: without one the model takes short cuts that
    differ between the first step and the others."""
    ids = values.get("input_ids")
    known = any(name.partition("__")[0] == MASK for name in values)
    cache: Any = values.get(CACHE)
    if known or not isinstance(ids, Tensor) or type(cache).__name__ not in _CACHES:
        return values
    length = ids.shape[1] + int(cache.get_seq_length())
    mask = torch.ones(ids.shape[0], length, dtype=torch.long, device=ids.device)
    return {**values, MASK: mask}


def kind_of(values: Values) -> Kind | None:
    """The kind of a call; None where it has something that no graph takes, or no cache."""
    cache: Any = values.get(CACHE)
    if type(cache).__name__ not in _CACHES:
        return None
    tensors, constants = [], []
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            tensors.append((name, value.ndim, value.dtype))
        elif type(value) in _LITERALS:
            constants.append((name, value))
        elif value is not cache:
            return None
    layers = tuple(type(layer).__name__ for layer in cache.layers)
    return Kind(tuple(tensors), tuple(constants), (type(cache), layers))


def new_cache(kind: Kind, config: Any, length: int) -> Cache:
    """An empty cache of that kind; a static one holds ``length`` positions."""
    cls, _ = kind.cache
    config = config.get_text_config(decoder=True)
    made: Cache = cls(config=config, **({"max_cache_len": length} if _is_static(cls) else {}))
    return made


def _is_static(cls: type) -> bool:
    return cls.__name__ == "StaticCache"


def arguments_of(
    shell: nn.Module, kind: Kind, ids: Tensor, mask: Tensor, cache: Cache, new: int
) -> Values:
    """What the model's own generation code passes for the last ``new`` of the tokens ``ids``
    ``(B, T)``, of which the others are in the cache; ``mask`` ``(B, T)`` is 0 at padding."""
    loop: Any = shell
    given: dict[str, Any] = {MASK: mask}
    if any(name == "position_ids" for name, _, _ in kind.tensors):
        given["position_ids"] = loop._prepare_position_ids_for_generation(ids, given)
    made = loop.prepare_inputs_for_generation(
        ids,
        next_sequence_length=new,
        past_key_values=cache,
        is_first_iteration=ids.shape[1] == new,
        **given,
        **dict(kind.constants),
    )
    call = flat(made)
    if any(name == MASK and ndim == 2 for name, ndim, _ in kind.tensors):
        # for a static cache the code above has made the mask ready, unless it found no padding;
        # with_mask put this one in its place
        call = {k: v for k, v in call.items() if k.partition("__")[0] != MASK} | {MASK: mask}
    return call
