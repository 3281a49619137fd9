"""The best plans of each set of kinds, compared on more data where what was held back cannot tell.

More kinds are more plans, and the best of more plans on few tokens is more often one that was
lucky. So the best plan of every set of kinds stays in the comparison to the end, and where the
paired difference of two of them is within twice its standard error, both are also run on calls that
the statistics were taken of, as many as tell them apart. Of what cannot be told apart the plan of
the fewest kinds is kept, which is the one-standard-error rule of Breiman et al. (1984, section
3.4.3).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxshare.base.spent import part
from fxshare.planning.judge import Candidate, Judge
from fxshare.planning.planned import Planned
from fxshare.planning.slope import estimate

_LOG = logging.getLogger(__name__)
_NEAR = 1.5
"""So many times what the best plan measures is no finalist."""
_TOLD = 2.0
"""Standard errors of a difference that tells two plans apart."""
_FEWEST = 4
"""Calls of the statistics' data that are taken at first."""


def best_of_each(plans: Sequence[Planned]) -> list[Planned]:
    """The best plan of every set of kinds and widths, by what it measures, the fewest kinds
    first."""
    found: dict[object, Planned] = {}
    for one in sorted(plans, key=lambda one: one.measured):
        found.setdefault((one.trial.without, one.trial.bits), one)
    return sorted(found.values(), key=_freedom)


def _freedom(one: Planned) -> tuple[int, bool, int]:
    """How much a plan was chosen from."""
    trial = one.trial
    return -len(trial.without), not trial.bits, len(trial.bits)


def finalists(plans: Sequence[Planned]) -> list[Planned]:
    """Those of :func:`best_of_each` that are near the best one."""
    each = best_of_each(plans)
    least = min((one.measured for one in each), default=0.0)
    return [one for one in each if one.measured <= _NEAR * max(least, 0.0) or one.measured == least]


@dataclass(frozen=True)
class Calls:
    """A judge and the tokens of each of its calls."""

    judge: Judge
    tokens: Sequence[float]

    def losses(self, on: Candidate, which: Sequence[int]) -> list[float]:
        """What each of some calls loses, up to what is the same for all candidates."""
        if self.judge.is_distance:
            self.judge.run_dense(which)
        return self.judge.losses(on, which)


@part("judge", whole=True)
def decided(
    plans: Sequence[Planned],
    held_back: Calls,
    fit: Calls,
    made: Callable[[Planned, Judge], Candidate],
) -> Planned:
    """The plan that is kept of some, which have the fewest kinds first; ``made`` makes the model of
    a plan for a judge."""
    whole = range(len(held_back.tokens))
    losses = [held_back.losses(made(one, held_back.judge), whole) for one in plans]
    tokens, taken = list(held_back.tokens), 0
    while True:
        leader = min(range(len(plans)), key=lambda at: sum(losses[at]))
        behind = [
            0.0 if at == leader else _behind(one, losses[leader], tokens)
            for at, one in enumerate(losses)
        ]
        close = [at for at, one in enumerate(behind) if one <= _TOLD]
        if len(close) == 1 or taken == len(fit.tokens):
            break
        more = range(taken, min(max(2 * taken, _FEWEST), len(fit.tokens)))
        for at, one in enumerate(plans):
            out = [math.inf] * len(more)
            losses[at] += fit.losses(made(one, fit.judge), more) if at in close else out
        tokens += [fit.tokens[number] for number in more]
        taken = more.stop
    kept = next(at for at, one in enumerate(behind) if one <= 1.0)
    _LOG.info(
        "plan: of %d sets of kinds the best is %s; told on %s tokens, %s of them not held back",
        len(plans),
        plans[kept].trial.name,
        f"{round(sum(tokens)):,}",
        f"{round(sum(fit.tokens[:taken])):,}",
    )
    return plans[kept]


def _behind(losses: Sequence[float], least: Sequence[float], tokens: Sequence[float]) -> float:
    """How many standard errors of their difference a plan loses more than the one of least loss;
    those of few calls are wide."""
    gaps = [a - b for a, b in zip(losses, least, strict=True)]
    if not any(gaps):
        return 0.0
    if not all(math.isfinite(gap) for gap in gaps):
        return math.inf
    apart = estimate(gaps, tokens)
    return apart.value / max(apart.error, 1e-300)


__all__ = ["Calls", "best_of_each", "decided", "finalists"]
