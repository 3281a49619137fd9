"""Which rows of which linear hold a linear that was repacked.

While a readable graph is lowered, its linears are merged into others. Each of them is remembered by
the name that it had, so that the readable graph can be filled with the lowered one's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from passes.graph.graph import weight_and_bias
from passes.graph.slices import gather_order

_KEY = "origins"


@dataclass(frozen=True)
class Origin:
    """A linear of the readable graph is rows ``start:stop`` of the linear ``module``; with
    ``order`` set, in the order in which the pivoted basis of that name reads its inputs.

    ``copies`` are places that hold the same rows once more.
    """

    module: str
    start: int
    stop: int
    order: str | None = None
    copies: tuple[tuple[str, int, int], ...] = ()


def origins(gm: fx.GraphModule) -> Mapping[str, Origin]:
    """The linears that were repacked since :func:`forget_origins`, by the names they had."""
    found: Mapping[str, Origin] = gm.meta.get(_KEY, {})
    return found


def forget_origins(gm: fx.GraphModule) -> None:
    """Take the linears as they are now for the original ones."""
    gm.meta[_KEY] = {}


def moved(gm: fx.GraphModule, names: Sequence[str], to: str, heights: Sequence[int]) -> None:
    """Record that the linears ``names``, one after the other, are the rows of ``to`` now."""
    found = dict(origins(gm))
    held = {origin.module for origin in found.values()}
    at = 0
    for name, height in zip(names, heights, strict=True):
        for key, origin in origins(gm).items():
            if origin.module == name:
                start, stop = origin.start + at, origin.stop + at
                found[key] = replace(origin, module=to, start=start, stop=stop)
        if name not in held:
            old = found.get(name)
            place = (to, at, at + height)
            if old is None:
                found[name] = Origin(*place)
            else:
                found[name] = replace(old, copies=(*old.copies, place))
        at += height
    gm.meta[_KEY] = found


def reordered(gm: fx.GraphModule, name: str, basis: str) -> None:
    """Record that all rows of the linear ``name`` are in the order of a pivoted basis now."""
    found = dict(origins(gm))
    held = [key for key, origin in found.items() if origin.module == name]
    weight_OI, _ = weight_and_bias(gm.get_submodule(name))
    for key in held or [name]:
        origin = found.get(key, Origin(name, 0, len(weight_OI)))
        found[key] = replace(origin, order=basis)
    gm.meta[_KEY] = found


def put_back(gm: fx.GraphModule, basis: str) -> None:
    """Record that rows which were in the order of a pivoted basis are in their own again."""
    gm.meta[_KEY] = {
        key: replace(origin, order=None) if origin.order == basis else origin
        for key, origin in origins(gm).items()
    }


def original(gm: nn.Module, origin: Origin, tensor: Tensor) -> Tensor:
    """The rows of ``tensor``, a weight or bias of ``origin.module``, as they were: a view unless
    they were put in another order."""
    rows = tensor[origin.start : origin.stop]
    order = None if origin.order is None else gather_order(gm, origin.order)
    return rows if order is None else rows.index_select(0, order.argsort().to(rows.device))
