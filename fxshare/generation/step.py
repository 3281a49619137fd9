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
ENCODED = "encoder_outputs__last_hidden_state"
DECODER_MASK = "decoder_attention_mask"
# by name, because only these are known to be told apart by their class and their layers
_CACHES = ("DynamicCache", "StaticCache")
_LITERALS = (bool, int, float, str)


@dataclass(frozen=True)
class CacheKind:
    """What of a cache decides about the graph. ``cross`` is that of the encoder's keys, where there
    is one, and ``filled`` whether they are in it: the first step writes them, later ones read
    them."""

    cls: type
    layers: tuple[str, ...]
    cross: CacheKind | None = None
    filled: bool = False

    @staticmethod
    def of(cache: Any) -> CacheKind | None:
        """The kind of a cache; None where it is one that no graph takes."""
        if type(cache).__name__ == "EncoderDecoderCache":
            own = CacheKind.of(cache.self_attention_cache)
            cross = CacheKind.of(cache.cross_attention_cache)
            if own is None or cross is None:
                return None
            return CacheKind(own.cls, own.layers, cross, any(cache.is_updated.values()))
        if type(cache).__name__ not in _CACHES:
            return None
        return CacheKind(type(cache), tuple([type(layer).__name__ for layer in cache.layers]))

    def new(self, config: Any, length: int, source: int = 0) -> Cache:
        """An empty cache of this kind; static ones hold ``length`` positions, and ``source`` of
        the encoder."""
        config = config.get_text_config(decoder=True)
        own: Cache = self.cls(config=config, **self._size(length))
        if self.cross is None:
            return own
        from transformers.cache_utils import EncoderDecoderCache

        return EncoderDecoderCache(own, self.cross.new(config, source))

    def _size(self, length: int) -> dict[str, int]:
        return {"max_cache_len": length} if self.cls.__name__ == "StaticCache" else {}


@dataclass(frozen=True)
class Kind:
    """What decides which graph a call needs: which tensors it gives, constants, and the cache; the
    encoder has none."""

    tensors: tuple[tuple[str, int, torch.dtype], ...]
    constants: tuple[tuple[str, Any], ...]
    cache: CacheKind | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the graph, in order."""
        names = [name for name, _, _ in self.tensors]
        return (*names, CACHE) if self.cache is not None else tuple(names)

    @property
    def logits(self) -> int:
        """Positions, from the last one back, whose logits the call wants; 0 is all."""
        return int(dict(self.constants).get("logits_to_keep", 0))

    def takes(self, name: str) -> bool:
        """Whether a tensor of that name is given."""
        return any(name == given for given, _, _ in self.tensors)

    def __str__(self) -> str:
        given = ", ".join(f"{name} ({ndim}-d)" for name, ndim, _ in self.tensors)
        if self.cache is None:
            return f"the encoder with {given}"
        which = "" if self.cache.cross is None else "later " if self.cache.filled else "first "
        return f"a {which}step with {given} and a {self.cache.cls.__name__}"


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
    if "encoder_outputs" in result:
        from transformers.modeling_outputs import BaseModelOutput

        result["encoder_outputs"] = BaseModelOutput(**result["encoder_outputs"])
    return result


def with_mask(values: Values) -> Values:
    """The call with a mask of ones for the tokens where none is given: without one the model takes
    short cuts that differ between the first step and the others."""
    cache: Any = values.get(CACHE)
    if ENCODED in values or "decoder_input_ids" in values:
        ids, name = values.get("decoder_input_ids"), DECODER_MASK
    else:
        ids, name = values.get("input_ids"), MASK
    known = any(given.partition("__")[0] == name for given in values)
    if known or not isinstance(ids, Tensor) or CacheKind.of(cache) is None:
        return values
    length = ids.shape[1] + int(cache.get_seq_length())
    mask = torch.ones(ids.shape[0], length, dtype=torch.long, device=ids.device)
    return {**values, name: mask}


def kind_of(values: Values) -> Kind | None:
    """The kind of a step, or of a call of the encoder, which has no cache; None where it has
    something that no graph takes."""
    cache: Any = values.get(CACHE)
    tensors, constants = [], []
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            tensors.append((name, value.ndim, value.dtype))
        elif type(value) in _LITERALS:
            constants.append((name, value))
        elif value is not cache:
            return None
    found = CacheKind.of(cache)
    if found is None and cache is not None:
        return None
    return Kind(tuple(tensors), tuple(constants), found)


def arguments_of(
    shell: nn.Module, kind: Kind, ids: Tensor, mask: Tensor, cache: Cache, new: int
) -> Values:
    """What the model's own generation code passes for the last ``new`` of the tokens ``ids``
    ``(B, T)``, of which the others are in the cache; ``mask`` ``(B, T)`` is 0 at padding."""
    loop: Any = shell
    given: dict[str, Any] = {MASK: mask}
    if kind.takes("position_ids"):
        given["position_ids"] = loop._prepare_position_ids_for_generation(ids, given)
    call = _prepared(loop, kind, ids, cache, new, given)
    if any(name == MASK and ndim == 2 for name, ndim, _ in kind.tensors):
        # for a static cache the code above has made the mask ready, unless it found no padding;
        # with_mask put this one in its place
        call = {k: v for k, v in call.items() if k.partition("__")[0] != MASK} | {MASK: mask}
    return call


def decoder_arguments(
    shell: nn.Module, kind: Kind, ids: Tensor, source: Mapping[str, Tensor], cache: Cache, new: int
) -> Values:
    """:func:`arguments_of` for the decoder of an encoder-decoder model; ``source`` is what the
    encoder made, and the mask of what it read where the kind has one."""
    given = nested(source)
    mask = torch.ones_like(ids)
    if kind.takes("decoder_position_ids"):  # they follow from a mask that the user gave
        given[DECODER_MASK] = mask
    call = _prepared(shell, kind, ids, cache, new, given)
    for name, ndim, dtype in kind.tensors:
        if name == DECODER_MASK and ndim == 2:
            call[name] = mask
        elif name == DECODER_MASK and name not in call:
            # the code above makes one for a static cache, but not for several tokens at the start
            call[name] = _causal(cache, ids.shape[1] - new, mask[:, -new:], dtype)
    return call


def _causal(cache: Any, old: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask ``(B, 1, T, positions)`` of ``T`` tokens ``like`` ``(B, T)`` after ``old`` ones in a
    static cache."""
    rows, new = like.shape
    at_K = torch.arange(cache.self_attention_cache.layers[0].max_cache_len, device=like.device)
    seen_TK = at_K <= torch.arange(old, old + new, device=like.device)[:, None]
    if dtype.is_floating_point:
        far = torch.finfo(dtype).min
        seen_TK = torch.zeros(seen_TK.shape, dtype=dtype, device=like.device).masked_fill(
            ~seen_TK, far
        )
    return seen_TK.expand(rows, 1, -1, -1)


def _prepared(
    loop: Any, kind: Kind, ids: Tensor, cache: Cache, new: int, given: Mapping[str, Any]
) -> Values:
    return flat(
        loop.prepare_inputs_for_generation(
            ids,
            next_sequence_length=new,
            past_key_values=cache,
            is_first_iteration=ids.shape[1] == new,
            **given,
            **dict(kind.constants),
        )
    )
