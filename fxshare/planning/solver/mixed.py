"""Partitions in which some slices are taken by candidates of another kind than groups.

Such a candidate (:attr:`fxshare.planning.solver.problem.Problem.others`) takes fixed slices, all of
them or none: what it takes is in no group, and no run of layers reaches over it. Given which are
taken, each row of layers falls into segments, and the best partition of every segment is known; so
whole candidates are put in and taken out while that helps.

What no choice at all can go below is a Lagrangian decomposition (Guignard & Kim 1987): the value of
a candidate is split over its slices, and each row may pay a slice's share instead of grouping it.
Any split is a bound; subgradient steps look for a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxshare.planning.solver.grow import Run, grow, shortest
from fxshare.planning.solver.problem import Part, Problem

_STEPS = 24
_TIE = 1e-12
_GROWN = frozenset({"auto", "grown", "same_input"})


def mixed(
    problem: Problem,
    price: float,
    parts: Sequence[Part],
    rows: Sequence[Sequence[Part]],
    strategy: str,
) -> list[Part]:
    """The best found of a strategy's partition, and of those in which candidates of other kinds
    take slices; notes a bound for all of these. ``rows`` are the layers of each family."""
    if not problem.others:
        return list(parts)
    tables = [_Row.of(problem, price, row, strategy) for row in rows]
    choice = _Choice(problem, price, tables)
    taken = choice.best()
    found = [choice.partition(taken), _repaired(problem, price, parts, taken)]
    if not problem.insists:
        found.append(list(parts))
    best = min(found, key=lambda one: sum(problem.value(part, price) for part in one))
    value = sum(problem.value(part, price) for part in best)
    problem.note_bound(price, min(choice.bound(value), value))
    return best


@dataclass(eq=False)
class _Row:
    """A row of layers at a price. ``values`` of the runs that may be groups, ``least`` bounds of
    others, ``best`` of every run's partitions."""

    parts: Sequence[Part]
    values: dict[Run, float]
    least: dict[Run, float]
    best: dict[Run, float]

    @staticmethod
    def of(problem: Problem, price: float, row: Sequence[Part], strategy: str) -> _Row:
        if strategy in _GROWN:
            grown = grow(problem, row, price)
            at = grown.position(price)
            least = {run: float(one[at]) for run, one in grown.least.items()}
            values = {run: float(one[at]) for run, one in grown.values.items()}
            best = {run: float(one[at]) for run, one in grown.best.items()}
            return _Row(row, values, least, best)
        values = {}
        for start in range(len(row)):
            part: Part = frozenset()
            for end in range(start + 1, len(row) + 1):
                part |= row[end - 1]
                shares = end > start + 1
                if shares and (strategy == "separate" or not problem.is_priced(part)):
                    continue
                if problem.allowed(part):
                    values[start, end] = problem.value(part, price)
        return _Row(row, values, {}, _partitions(len(row), values))


def _partitions(length: int, values: Mapping[Run, float]) -> dict[Run, float]:
    best: dict[Run, float] = {}
    for size in range(1, length + 1):
        for start in range(length - size + 1):
            run = start, start + size
            apart = [best[start, at] + best[at, run[1]] for at in range(start + 1, run[1])]
            best[run] = min([values.get(run, float("inf")), *apart])
    return best


class _Choice:
    """Which candidates are taken."""

    def __init__(self, problem: Problem, price: float, rows: Sequence[_Row]) -> None:
        self.problem, self.price, self.rows = problem, price, rows
        self.keys = list(problem.others)
        self.values = {key: problem.value(key, price) for key in self.keys}
        self.finest = {name: part for part in problem.singletons() for name in part}
        self.single = {
            part: problem.value(part, price) for part in dict.fromkeys(self.finest.values())
        }
        self.place = {
            name: (number, at)
            for number, row in enumerate(rows)
            for at, part in enumerate(row.parts)
            for name in part
        }
        slices = {key: problem.others[key].slices for key in self.keys}
        self.slices = slices
        self.clash = {
            key: [o for o in self.keys if o != key and slices[o] & slices[key]] for key in self.keys
        }

    def best(self) -> frozenset[Part]:
        """The taken ones, from none and from all that are worth more than single slices."""
        single = {
            key: sum(self.single[p] for p in {self.finest[n] for n in self.slices[key]})
            for key in self.keys
        }
        gains = sorted(self.keys, key=lambda key: self.values[key] - single[key])
        eager: frozenset[Part] = frozenset()
        for key in gains:
            worth = self.problem.insists or self.values[key] < single[key]
            if worth and not eager & set(self.clash[key]):
                eager |= {key}
        if self.problem.insists:
            return eager
        found = [self._improved(start) for start in (frozenset[Part](), eager)]
        return min(found, key=self.total)

    def _improved(self, taken: frozenset[Part]) -> frozenset[Part]:
        now = self.total(taken)
        while True:
            helped = False
            for key in self.keys:
                other = taken - {key} if key in taken else (taken - set(self.clash[key])) | {key}
                value = now + self._change(taken, other)
                if value < now - _TIE * max(abs(now), 1e-300):
                    taken, now, helped = other, value, True
            if not helped:
                return taken

    def total(self, taken: frozenset[Part]) -> float:
        """The value of everything."""
        gone = self._gone(taken)
        rows = range(len(self.rows))
        return sum(self._row(n, gone) for n in rows) + sum(self.values[key] for key in taken)

    def _change(self, taken: frozenset[Part], other: frozenset[Part]) -> float:
        differ = taken ^ other
        rows = {self.place[name][0] for key in differ for name in self.slices[key]}
        before, after = self._gone(taken), self._gone(other)
        found = sum(self._row(n, after) - self._row(n, before) for n in rows)
        for key in differ:
            found += self.values[key] if key in other else -self.values[key]
        return found

    def _gone(self, taken: frozenset[Part]) -> frozenset[str]:
        return frozenset[str]().union(*(self.slices[key] for key in taken))

    def _row(self, number: int, gone: frozenset[str]) -> float:
        row = self.rows[number]
        total, start = 0.0, 0
        for at, part in enumerate(row.parts):
            if part & gone:
                total += row.best[start, at] if at > start else 0.0
                total += sum(self.single[p] for p in self._left(part, gone))
                start = at + 1
        return total + (row.best[start, len(row.parts)] if start < len(row.parts) else 0.0)

    def _left(self, part: Part, gone: frozenset[str]) -> list[Part]:
        """What is left of a layer of which some slices are taken (other experts), one by one."""
        return list(dict.fromkeys(self.finest[name] for name in part if name not in gone))

    def partition(self, taken: frozenset[Part]) -> list[Part]:
        """The best partition of the rest, and what is taken."""
        gone = self._gone(taken)
        found = [key for key in self.keys if key in taken]
        for row in self.rows:
            start = 0
            for at, part in enumerate((*row.parts, frozenset[str]())):
                if at < len(row.parts) and not part & gone:
                    continue
                found += _runs(row, start, at)
                found += self._left(part, gone) if part & gone else []
                start = at + 1
        return found

    def bound(self, value: float) -> float:
        """No choice has a lower value; ``value`` is one that was found."""
        if self.problem.insists:
            return value
        shares = {key: self._first_shares(key) for key in self.keys}
        best = -float("inf")
        scale = 1.0
        for _ in range(_STEPS):
            found, paid = self._relaxed(shares)
            if found > best:
                best = found
            else:
                scale /= 2
            steps = {}
            for key, own in shares.items():
                wanted = np.array([float(paid.get(name) == key) for name in own])
                steps[key] = wanted - wanted.mean()
            size = sum(float(step @ step) for step in steps.values())
            if size < 1e-9 or value - best <= 1e-9 * abs(value):
                break
            step = scale * (value - found) / size
            for key, own in shares.items():
                moved = np.array(list(own.values())) + step * steps[key]
                shares[key] = dict(zip(own, moved.tolist(), strict=True))
        return best

    def _first_shares(self, key: Part) -> dict[str, float]:
        """The value of a candidate over its slices, as they are worth one by one."""
        names = sorted(self.slices[key])
        worth = np.array([max(self.single[self.finest[name]], 0.0) for name in names])
        total = float(worth.sum())
        part = worth / total if total > 0 else np.full(len(names), 1 / len(names))
        return dict(zip(names, (part * self.values[key]).tolist(), strict=True))

    def _relaxed(self, shares: Mapping[Part, Mapping[str, float]]) -> tuple[float, dict[str, Part]]:
        """The value where each row pays shares as it likes, and whose share it pays of a slice."""
        least: dict[str, tuple[float, Part]] = {}
        for key, own in shares.items():
            for name, share in own.items():
                if name not in least or share < least[name][0]:
                    least[name] = share, key
        total = 0.0
        paid: dict[str, Part] = {}
        for row in self.rows:
            values = row.least | row.values
            broken = {}
            for at, part in enumerate(row.parts):
                if any(name in least for name in part):
                    value, mine = self._broken(part, least)
                    if value < values.get((at, at + 1), float("inf")):
                        values[at, at + 1] = value
                        broken[at] = mine
            found, back = shortest(len(row.parts), values)
            total += found
            end = len(row.parts)
            while end:
                start = back[end]
                if end == start + 1 and start in broken:
                    paid |= broken[start]
                end = start
        return total, paid

    def _broken(
        self, part: Part, least: Mapping[str, tuple[float, Part]]
    ) -> tuple[float, dict[str, Part]]:
        value, mine = 0.0, {}
        for own in dict.fromkeys(self.finest[name] for name in part):
            (name, *more) = own
            share = least.get(name) if not more else None
            if share is not None and share[0] < self.single[own]:
                value += share[0]
                mine[name] = share[1]
            else:
                value += self.single[own]
        return value, mine


def _runs(row: _Row, start: int, end: int) -> list[Part]:
    """The best partition of some layers into groups."""
    if start == end:
        return []
    values = {
        (a - start, b - start): value
        for (a, b), value in row.values.items()
        if start <= a and b <= end
    }
    _, back = shortest(end - start, values)
    found, at = [], end - start
    while at:
        first = back[at]
        found.append(frozenset[str]().union(*row.parts[start + first : start + at]))
        at = first
    return found


def _repaired(
    problem: Problem, price: float, parts: Sequence[Part], taken: frozenset[Part]
) -> list[Part]:
    """A partition from which slices are taken: what is left of a group is one where that was
    priced, else single slices."""
    gone = frozenset[str]().union(*(problem.others[key].slices for key in taken))
    finest = {name: part for part in problem.singletons() for name in part}
    found = [key for key in problem.others if key in taken]
    for part in parts:
        if part in problem.others:
            continue
        rest = part - gone
        if rest == part:
            found.append(part)
        elif rest:
            apart = list(dict.fromkeys(finest[name] for name in sorted(rest)))
            whole = problem.is_priced(rest) and problem.value(rest, price) < sum(
                problem.value(one, price) for one in apart
            )
            found += [rest] if whole else apart
    return found


__all__ = ["mixed"]
