"""What a proposal leaves to the user: embeddings, and the heads beside them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from fxshare.config import ShareConfig, WeightType
from fxshare.errors import MatchError
from fxshare.sites.match import matching
from passes import is_embedding, is_linear


@dataclass(frozen=True)
class OptionalType:
    """A weight type that is off unless asked for: ``readers`` are the modules that read the one
    weight, ``numbers`` how many it has."""

    name: str
    spec: WeightType
    readers: tuple[str, ...]
    shape: tuple[int, int]
    numbers: int


def optional_types(
    model: nn.Module, taken: Collection[str], least: float
) -> tuple[OptionalType, ...]:
    """A type for every embedding and every linear that is in no layer and has ``least`` numbers or
    more, with what is tied to it; ``taken`` are names of other types."""
    readers: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not (is_embedding(module) or is_linear(module)):
            continue
        if isinstance(module.weight, nn.Parameter):  # else something computes it
            readers.setdefault(id(module.weight), []).append(name)
    found: list[OptionalType] = []
    names = set(taken)
    for modules in readers.values():
        weight = model.get_submodule(modules[0]).get_parameter("weight")
        if weight.numel() < least or any(re.search(r"\.\d+\.", f".{m}.") for m in modules):
            continue
        looked_up = any(is_embedding(model.get_submodule(m)) for m in modules)
        spec = WeightType(pattern=f"{re.escape(modules[0])}$", embedding=looked_up)
        name = modules[0].rpartition(".")[2]
        while name in names:
            name += "_"
        try:
            sites = matching(model, ShareConfig(weight_types={name: spec})).sites
        except MatchError:
            continue
        names.add(name)
        rows, columns = sites[0].out_features, sites[0].in_features
        found.append(OptionalType(name, spec, tuple(modules), (rows, columns), weight.numel()))
    return tuple(found)
