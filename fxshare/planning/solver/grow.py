"""Runs of layers that grow from pairs: a number of decompositions linear in the layers.

A run is priced where it is one layer or two, or where both runs of one layer less gained something
at some price (more, the larger it is): where two neighbours gain nothing by sharing, three seldom
do. Of those, a run whose bound from below gains at no price is not priced either. What was not
priced still counts in the dual bound, at its own bound
(:meth:`fxshare.planning.solver.problem.Problem.least`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fxshare.planning.solver.curve import Floats
from fxshare.planning.solver.problem import Part, Problem

_TIE = 1e-12
LEAST_SHARE = 0.2
LEAST_GAIN = 0.005
"""Of a run's value apart. Sharing nearly always saves the indices of one pivoted basis, about a
five-hundredth; that says nothing of longer runs."""
_LARGE = 2048
"""Rows of a decomposition above which it grows with them: of three layers of 5,632 inputs one takes
a quarter of a minute, and where pairs gain less than a hundredth, all of them an hour."""
Run = tuple[int, int]
"""From the first layer to the one after the last, by position in the row."""


@dataclass(eq=False)
class Grown:
    """The runs of one row, and the best partition at every price.

    ``values`` of the runs that were priced, ``least`` bounds from below of all others, at each of
    ``prices``.
    """

    row: Sequence[Part]
    prices: Floats
    values: dict[Run, Floats] = field(default_factory=dict)
    least: dict[Run, Floats] = field(default_factory=dict)
    best: dict[Run, Floats] = field(default_factory=dict)
    """Of every run the best partition into priced ones."""

    def part(self, run: Run) -> Part:
        """The slices of a run."""
        return frozenset[str]().union(*self.row[slice(*run)])

    def partition(self, price: float) -> list[Part]:
        """The best partition into priced runs at one of the prices."""
        at = self.position(price)
        _, back = shortest(len(self.row), {run: v[at] for run, v in self.values.items()})
        chosen, end = [], len(self.row)
        while end:
            start = back[end]
            chosen.append(self.part((start, end)))
            end = start
        return chosen

    def bound(self, price: float) -> float:
        """No partition into runs, priced or not, has a lower value at one of the prices."""
        at = self.position(price)
        values = {run: v[at] for run, v in (self.least | self.values).items()}
        return shortest(len(self.row), values)[0]

    def position(self, price: float) -> int:
        """Which of the prices it is."""
        return int(np.flatnonzero(self.prices == price)[0])


def shortest(length: int, values: dict[Run, float]) -> tuple[float, list[int]]:
    """The shortest path through the boundaries between layers; of equal ones the shorter run."""
    best, back = [0.0] + [float("inf")] * length, [0] * (length + 1)
    for end in range(1, length + 1):
        for start in range(end - 1, -1, -1):
            value = values.get((start, end))
            if value is not None and best[start] + value < best[end] * (1 - _TIE):
                best[end], back[end] = best[start] + value, start
    return best[length], back


def grow(problem: Problem, row: Sequence[Part], price: float) -> Grown:
    """The runs of a row, grown at all of the problem's fixed prices at once, or at ``price`` alone
    where it is none of these."""
    if price not in problem.prices:
        return _grow(problem, row, np.asarray([price]))
    key = tuple(row)
    if key not in problem.grown:
        problem.grown[key] = _grow(problem, row, problem.prices)
    found: Grown = problem.grown[key]
    return found


def _grow(problem: Problem, row: Sequence[Part], prices: Floats) -> Grown:
    grown = Grown(row, prices)
    counts = _counts(problem, row, prices)
    split = grown.best
    growing: set[Run] = set()
    for length in range(1, len(row) + 1):
        for start in range(len(row) - length + 1):
            run = (start, start + length)
            part = grown.part(run)
            if not problem.allowed(part):
                if problem.others:  # which leave segments of any length
                    split[run] = _best_apart(run, split)
                continue
            apart = _best_apart(run, split)
            shorter = {(run[0], run[1] - 1), (run[0] + 1, run[1])}
            grows = length <= 2 or length == len(row) or shorter <= growing
            if length == 1 or (grows and problem.considers(part)):
                values = _priced(problem, grown, run, apart)
            else:
                values = None
            if values is None:
                grown.least[run] = problem.least(part, grown.prices)
            else:
                grown.values[run] = values
                least = _least_gain(problem, part, length)
                if length > 1 and bool((values < apart * (1 - least))[counts].any()):
                    growing.add(run)
            split[run] = apart if values is None else np.minimum(apart, values)
    return grown


def _least_gain(problem: Problem, part: Part, length: int) -> float:
    """What a run of so many layers has to gain for those of one more to be priced."""
    nodes = [problem.nodes[name] for name in part]
    outputs = sum(node.out_features for node in nodes) * (length + 1) / length
    size = min(nodes[0].in_features, outputs)
    return LEAST_GAIN * max(size / _LARGE, 1.0)


def _counts(problem: Problem, row: Sequence[Part], prices: Floats) -> NDArray[np.bool_]:
    """The prices at which a gain makes runs grow: where single layers cost :data:`LEAST_SHARE` of
    what they do dense, or more. Where next to nothing is paid for, sharing always gains."""
    return np.asarray([paid_share(problem, [row], float(p)) >= LEAST_SHARE for p in prices])


def paid_share(problem: Problem, rows: Sequence[Sequence[Part]], price: float) -> float:
    """What the parts of some rows cost at a price, best chosen, by their dense cost."""
    curves = [problem.candidate(part).curve for row in rows for part in row]
    dense = sum(int(curve.cost[-1]) for curve in curves)
    return sum(int(c.cost[c.at_price(price)]) for c in curves) / max(dense, 1)


def _best_apart(run: Run, split: dict[Run, Floats]) -> Floats:
    """The best of a run's partitions into two or more shorter runs, at every price."""
    start, end = run
    found = [split[start, middle] + split[middle, end] for middle in range(start + 1, end)]
    return np.minimum.reduce(found) if found else np.asarray(np.inf)


def _priced(problem: Problem, grown: Grown, run: Run, apart: Floats) -> Floats | None:
    """The values of a run; None where its bound shows that it gains at no price."""
    part = grown.part(run)
    if run[1] - run[0] > 1 and not problem.is_priced(part):
        least = problem.least(part, grown.prices)
        if not bool((least < apart * (1 - _TIE)).any()):
            return None
    return problem.candidate(part).curve.values(grown.prices)
