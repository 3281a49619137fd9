"""A key-value cache with narrower keys or values, or fewer heads, which the model's own code cannot
go on with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxshare.errors import FxShareError
from fxshare.plans.keys import Keys
from fxshare.plans.plan import Plan
from fxshare.plans.whole_heads import WholeHeads


def check_width(cache: Any, plan: Plan) -> None:
    """Raise :class:`FxShareError` where a graph has put keys or values into a cache that are
    narrower, or of fewer heads, than those of the model's own code, which has zeros there."""
    layers = getattr(cache, "layers", None) or []
    for one in plan.units:
        before, after = one.cached
        at = one.layers[0] if len(one.layers) == 1 else None
        if before == after or at is None or at >= len(layers):
            continue
        what = "keys" if isinstance(one, Keys) else "values"
        held = getattr(layers[at], what, None)
        whole = isinstance(one, WholeHeads)
        axis = 1 if whole else -1
        if isinstance(held, Tensor) and held.numel() and held.shape[axis] == one.kept:
            has = f"a width of {one.kept} of {one.of} per head"
            if whole:
                has = f"{one.kept} of {one.of} heads"
            raise FxShareError(
                f"the cache has {what} of {one.name!r} with {has}, and this step runs the model's "
                "own code, which expects all of it; begin with an empty cache, or give the whole "
                "text with use_cache=False"
            )


__all__ = ["check_width"]
