"""Plans of a search that may be kept, for whoever compares them otherwise than by their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxshare.factors.group import GroupFactors
from fxshare.factors.units import UnitFactors
from fxshare.planning.held_back import Parts
from fxshare.planning.planned import Planned
from fxshare.planning.search import Found, Search
from fxshare.planning.trials import MOST_REFINED, AfterRefining
from fxshare.plans.outlook import Outlook
from fxshare.plans.plan import Plan
from fxshare.sites.site import Skipped


@dataclass(frozen=True, eq=False)
class Offered:
    """A plan, and the factors that realise it."""

    name: str
    """The trial that it comes from."""
    plan: Plan
    factors: Mapping[str, GroupFactors]
    units: Mapping[str, UnitFactors]
    """What carries out its entries of other kinds."""


Choose = Callable[[Sequence[Offered], Parts], Sequence[AfterRefining]]
"""What each of some plans loses after refinement; of those with the most steps the best is kept."""


def _contending(plans: Sequence[tuple[str, Planned]]) -> list[tuple[str, Planned]]:
    """The few plans that are worth refining: of each way to share and to choose ranks the best by
    its measured loss, whatever its floor and the round that it is of. Plans of one way differ by
    little, and refinement does not change their order much."""
    ranked = sorted(plans, key=lambda one: one[1].measured)
    found: dict[object, tuple[str, Planned]] = {}
    for name, one in ranked:
        trial = one.trial
        way = trial.merge, trial.blend, trial.loss_aware, *trial.among
        found.setdefault(way, (name, one))
    return list(found.values())[:MOST_REFINED]


def _kept(after: Sequence[AfterRefining]) -> int:
    """Which one is kept."""
    most = max(one.steps for one in after)
    return min(range(len(after)), key=lambda at: (after[at].steps < most, after[at].loss))


def plan_of(
    one: Planned, search: Search, skipped: Sequence[Skipped], outlook: Outlook | None = None
) -> Plan:
    """A plan of the search, as data."""
    return Plan(
        mode="planned",
        sites=search.sites,
        groups=one.groups,
        units=() if one.units is None else one.units.units,
        rounded=one.rounded,
        skipped=tuple(skipped),
        outlook=outlook,
    )


def choice(
    found: Found,
    search: Search,
    skipped: Sequence[Skipped],
    choose: Callable[[Sequence[Offered]], Sequence[AfterRefining]],
) -> Found:
    """The plan that is best after refinement, with what the others lose then."""
    plans = _contending(found.plans)
    offered = [
        Offered(
            name,
            plan_of(one, search, skipped),
            replace(one.factors, dtype=torch.float64),
            one.units or {},
        )
        for name, one in plans
    ]
    after = choose(offered)
    by_name = dict(zip((name for name, _ in plans), after, strict=True))
    tried = tuple(
        one if one.trial not in by_name else replace(one, after=by_name[one.trial])
        for one in found.tried
    )
    return Found(plans[_kept(after)][1], tried, found.plans)


__all__ = ["Choose", "Offered", "choice", "plan_of"]
