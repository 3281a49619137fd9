"""The parts that may be in a plan when its statistics are measured again.

The second statistics differ from the first by what the plan changes. A merge that no partition near
the plan's price has on the first is not priced on them again: it counts by its bound.
"""

from __future__ import annotations

from collections.abc import Callable

from fxshare.planning.solver.problem import Part, Problem

WITHIN = 8.0
"""How far from the plan's price a partition may be, as a factor."""


def contenders(problem: Problem, price: float, *, within: float = WITHIN) -> Callable[[Part], bool]:
    """Whether a part was priced and is in a part, or the whole of one, that the partitions found at
    prices of ``price / within`` to ``price · within`` have."""
    chosen: dict[str, set[Part]] = {}
    for collected in problem.collected.values():
        for at, parts in zip(collected.prices, collected.partitions, strict=True):
            if price / within <= at <= price * within:
                for part in parts:
                    for name in part:
                        chosen.setdefault(name, set()).add(part)
    priced = {candidate.slices for candidate in problem.seen()}

    def contends(part: Part) -> bool:
        return part in priced and any(part <= one for one in chosen.get(min(part), ()))

    return contends
