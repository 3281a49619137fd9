"""A key-value cache with narrower values, which the model's own code cannot go on with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxshare.errors import FxShareError
from fxshare.plans.plan import Plan


def check_width(cache: Any, plan: Plan) -> None:
    """Raise :class:`FxShareError` where a graph has put values into a cache that are narrower than
    those of the model's own code, which has zeros where the width ends."""
    layers = getattr(cache, "layers", None) or []
    for one in plan.units:
        before, after = one.cached
        at = one.layers[0] if len(one.layers) == 1 else None
        if before == after or at is None or at >= len(layers):
            continue
        values = getattr(layers[at], "values", None)
        if isinstance(values, Tensor) and values.numel() and values.shape[-1] == one.kept:
            raise FxShareError(
                f"the cache has values of {one.name!r} with a width of {one.kept} of {one.of} per "
                "head, and this step runs the model's own code, which expects all of it; begin "
                "with an empty cache, or give the whole text with use_cache=False"
            )


__all__ = ["check_width"]
