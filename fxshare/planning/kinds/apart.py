"""What each kind of candidate of a plan loses by itself, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fxshare.planning.kinds.kind import BASIS
from fxshare.planning.planned import Planned
from fxshare.planning.search import Search
from fxshare.plans.outlook import KindOutlook

_DENSE_IN_BITS = "bits"


def by_kind(search: Search, best: Planned) -> tuple[KindOutlook, ...]:
    """Every kind in a plan that has several, with all else dense, on the held-back data; none where
    there is no judge, or one kind. A quadratic model far from dense is wrong by another factor for
    every kind, and the whole does not say for which."""
    if search.judge is None:
        return ()
    found, judge = list(_apart(best)), search.judge
    if len(found) < 2:
        return ()
    outlooks = []
    for kind, one, losses in found:
        on = search.judged(one, judge)
        measured = judge.whole(on, judge.first(on)).per_token
        outlooks.append(
            KindOutlook(
                kind=kind,
                entries=len(losses),
                predicted=sum(losses),
                measured=measured if math.isfinite(measured) else None,
            )
        )
    judge.forget()
    return tuple(outlooks)


def _apart(best: Planned) -> Iterator[tuple[str, Planned, list[float]]]:
    """The plan with one kind alone, and what its entries are predicted to lose."""
    none = replace(best.factors, groups=())
    if best.groups:
        yield (
            BASIS,
            replace(best, units=None, rounded=()),
            [one.loss or 0.0 for one in best.groups],
        )
    if best.rounded:
        alone = replace(best, groups=(), factors=none, units=None)
        yield _DENSE_IN_BITS, alone, [one.loss or 0.0 for one in best.rounded]
    if best.units is None:
        return
    for kind in dict.fromkeys(one.kind for one in best.units.units):
        own = tuple(one for one in best.units.units if one.kind == kind)
        units = replace(best.units, units=own)
        alone = replace(best, groups=(), factors=none, rounded=(), units=units)
        yield kind, alone, [one.loss or 0.0 for one in own]


__all__ = ["by_kind"]
