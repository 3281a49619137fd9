"""The weights of a model that could be rewritten, and the stack of layers each belongs to.

A stack is a container with numbered children (``model.layers.0``, ``.1``, ...) in which the same
weights come again. Where containers nest (experts in layers, sublayers in blocks) the outermost
that repeats counts: sharing is across layers, not across the experts of one.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fxshare.sites.stacked import stores_columns
from passes.graph.graph import is_linear, weight_and_bias

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Weight:
    """One parameter that a pattern can match.

    ``name`` is what the pattern is matched against: the linear module, or a bare parameter.
    ``matrices`` is 1, or the number of experts of a stack ``(experts, out, in)``. ``stack``,
    ``layer`` and ``inside`` are the three parts of the name: ``model.layers``, ``3`` and
    ``mlp.up_proj``; without a stack ``layer`` is None and ``inside`` the whole name.
    """

    name: str
    parameter: int
    out_features: int
    in_features: int
    matrices: int = 1
    stack: str | None = None
    layer: int | None = None
    inside: str = ""

    @property
    def numbers(self) -> int:
        """Numbers that are stored, the bias apart."""
        return self.matrices * self.out_features * self.in_features

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(matrices, out, in)``."""
        return self.matrices, self.out_features, self.in_features

    @property
    def steps(self) -> list[str]:
        """The dotted name in its parts, every number as ``#``."""
        return ["#" if step.isdecimal() else step for step in self.name.split(".")]

    @property
    def kind(self) -> str:
        """``inside`` with every number as ``#``: what the same weight of other layers has too."""
        return ".".join("#" if s.isdecimal() else s for s in self.inside.split("."))


def weights_of(model: nn.Module, stacked: Mapping[str, bool] | None = None) -> list[Weight]:
    """Every weight of the model that could be a site, in the order of the model.

    Linear modules; ``in_proj_weight`` of ``nn.MultiheadAttention`` and its like; parameters
    ``(experts, out, in)``. Each once, under its first name, whatever it is tied to. ``stacked``
    names the parameters that a graph reads as stacks, and says which are ``(experts, in, out)``.
    """
    found: dict[int, Weight] = {}
    for weight in _candidates(model, stacked or {}):
        found.setdefault(weight.parameter, weight)
    return _with_stacks(list(found.values()))


def _candidates(model: nn.Module, stacked: Mapping[str, bool]) -> Iterator[Weight]:
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_linear(module):
            weight_OI, _ = weight_and_bias(module)
            if weight_OI.is_floating_point():
                rows, columns = weight_OI.shape
                # a computed weight is another tensor in every call
                owner = module.weight if isinstance(module.weight, nn.Parameter) else module
                yield Weight(name, id(owner), rows, columns, inside=name)
            continue
        if isinstance(module, _LOOKED_UP):
            continue
        for field, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{field}" if name else field
            shape = _matrices(model, name, module, field, parameter, stacked.get(full))
            if shape is not None:
                experts, rows, columns = shape
                yield Weight(full, id(parameter), rows, columns, experts, inside=full)


def _matrices(
    model: nn.Module,
    name: str,
    module: nn.Module,
    field: str,
    parameter: Tensor,
    columns_stored: bool | None,
) -> tuple[int, int, int] | None:
    """``(matrices, out, in)`` of a bare parameter that is multiplied by; None for any other.

    Any matrix could be a table or a linear, and any stack one matrix with its columns in heads
    (XLNet). Taken is what a graph reads as a stack (``columns_stored`` is not None), what names
    tell (the projections of ``nn.MultiheadAttention``, stacks of experts), and a stack beside
    another of as many matrices that reads what it writes.
    """
    if not parameter.is_floating_point():
        return None
    if isinstance(module, nn.MultiheadAttention) and field in _ATTENTION_WEIGHTS:
        return 1, *parameter.shape
    named = f"{name}.{field}.{type(module).__name__}"
    if parameter.ndim != 3 or min(parameter.shape) < 2:
        return None
    if columns_stored is None and not _EXPERTS.search(named) and not _has_partner(module, field):
        return None
    experts, rows, columns = parameter.shape
    if stores_columns(model, module, field) if columns_stored is None else columns_stored:
        rows, columns = columns, rows
    return experts, rows, columns


def _has_partner(module: nn.Module, field: str) -> bool:
    """Whether a stack ``(E, a, b)`` of a module stands beside one ``(E, b, a)``, as the way into
    experts beside the way out; half of the rows on the way in may be a gate."""
    stacks = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    own = stacks.pop(field)
    return any(_fit(own, other) or _fit(other, own) for other in stacks.values())


def _fit(way_in: Sequence[int], way_out: Sequence[int]) -> bool:
    (count, *one), (other_count, *other) = way_in, way_out
    if count != other_count or one[0] == one[1]:
        return False
    turned = [other[1], other[0]]
    return one in (turned, [2 * turned[0], turned[1]], [turned[0], 2 * turned[1]])


def _with_stacks(weights: Sequence[Weight]) -> list[Weight]:
    numbers: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    for weight in weights:
        for container, number, rest in _splits(weight.name):
            numbers[container, rest, weight.shape].add(number)
    return [_placed(weight, numbers) for weight in weights]


def _splits(name: str) -> Iterator[tuple[str, int, str]]:
    """The ways to read a name as container, number and rest, from the outermost."""
    steps = name.split(".")
    for at, step in enumerate(steps):
        if step.isdecimal() and at > 0:
            yield ".".join(steps[:at]), int(step), ".".join(steps[at + 1 :])


def _placed(weight: Weight, numbers: Mapping[tuple[object, ...], set[int]]) -> Weight:
    """The outermost container of which another child has a weight of this name and shape; where
    none repeats, the outermost there is."""
    splits = list(_splits(weight.name))
    repeating = [s for s in splits if len(numbers[s[0], s[2], weight.shape]) > 1]
    if not splits:
        return weight
    stack, layer, inside = (repeating or splits)[0]
    return replace(weight, stack=stack, layer=layer, inside=inside)


def alike(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights of one stack, name and shape together: what a weight type is. Those in no layer are
    each alone."""
    groups: defaultdict[tuple[object, ...], list[Weight]] = defaultdict(list)
    for weight in weights:
        own = (weight.stack, weight.kind, weight.shape)
        groups[own if weight.layer is not None else (weight.name,)].append(weight)
    return list(groups.values())


def total_numbers(model: nn.Module) -> int:
    """Numbers of all parameters, a tied one counted once."""
    return sum(math.prod(p.shape) for p in model.parameters())
