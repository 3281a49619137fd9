"""Ways to partition the slices at one price. Each returns a list of parts.

``layers`` and ``pairs`` are exact over the partitions that they consider (runs of consecutive
layers of a family; groups of at most two neighbours), ``exhaustive`` over all set partitions;
``grown`` considers the runs of ``layers`` and prices few of them; ``agglomerative`` is a heuristic
with local moves. ``auto`` takes the best of them.

Of partitions with parts that were not priced a strategy notes a bound
(:meth:`fxshare.planning.solver.problem.Problem.note_bound`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import networkx as nx

from fxshare.errors import PlanError
from fxshare.planning.solver.grow import LEAST_GAIN, LEAST_SHARE, grow, paid_share
from fxshare.planning.solver.mixed import mixed
from fxshare.planning.solver.problem import Part, Problem

Strategy = Callable[[Problem, float], list[Part]]
MOST_EXHAUSTIVE = 8
MOST_ENUMERATED = 13
"""Their partitions take seconds, each more three times as long."""
# agglomeration asks for the spectrum of every set it looks at, most of them not runs of layers: for
# the 48 slices of the embedded model ten times as many as `layers` and `same_input` together
_MOST_AGGLOMERATIVE = 24
# heads; q, k, v and what else reads an activation are fewer
_MANY_FAMILIES = 8
_TIE = 1e-12


def separate(problem: Problem, price: float) -> list[Part]:
    """No sharing: one part a slice."""
    del price
    return problem.singletons()


def layers(problem: Problem, price: float) -> list[Part]:
    """Runs of consecutive layers of each family: shortest path in the DAG of layer boundaries."""
    return _runs(problem, price, _families(problem, problem.singletons()))


def _families(problem: Problem, parts: Sequence[Part]) -> list[list[Part]]:
    """Per family its parts by layer; slices of one layer stay together."""
    rows: dict[object, dict[int, Part]] = {}
    alone: list[list[Part]] = []
    for part in parts:
        families = {problem.nodes[name].family for name in part}
        at = {problem.nodes[name].layer for name in part}
        if len(at) > 1:
            alone.append([part])
            continue
        row = rows.setdefault(frozenset(families), {})
        layer = next(iter(at))
        row[layer] = row.get(layer, frozenset()) | part
    return [[row[layer] for layer in sorted(row)] for row in rows.values()] + alone


def _runs(problem: Problem, price: float, rows: list[list[Part]]) -> list[Part]:
    chosen: list[Part] = []
    for row in rows:
        best = [0.0] + [float("inf")] * len(row)
        back: list[tuple[int, Part]] = [(0, frozenset())] * (len(row) + 1)
        # boundaries between layers, in order, are their own topological order: one sweep relaxes
        # every edge of the DAG, and networkx' general shortest path would only sort them again
        for end in range(1, len(row) + 1):
            part: Part = frozenset()
            for start in range(end - 1, -1, -1):
                part |= row[start]
                if not problem.allowed(part):
                    break
                value = best[start] + problem.value(part, price)
                # dense slices cost the same together as apart: of equal values, up to rounding, the
                # shorter run is taken, whatever the losses are scaled by
                if value < best[end] * (1 - _TIE):
                    best[end], back[end] = value, (start, part)
        at = len(row)
        while at:
            at, part = back[at]
            chosen.append(part)
    return chosen


def grown(problem: Problem, price: float) -> list[Part]:
    """Runs of consecutive layers of each family, grown from pairs that gain."""
    return _grown(problem, price, _families(problem, problem.singletons()))


def _grown(problem: Problem, price: float, rows: list[list[Part]]) -> list[Part]:
    chosen: list[Part] = []
    bound = 0.0
    for row in rows:
        runs = grow(problem, row, price)
        chosen += runs.partition(price)
        bound += runs.bound(price)
    problem.note_bound(price, bound)
    return chosen


def pairs(problem: Problem, price: float) -> list[Part]:
    """Groups of at most two neighbours: maximum-weight matching (Edmonds), exact."""
    graph = problem.graph(price)
    useful: nx.Graph[Part] = nx.Graph()
    useful.add_nodes_from(graph.nodes)
    useful.add_edges_from((a, b, d) for a, b, d in graph.edges(data=True) if d["weight"] > 0)
    matched = nx.max_weight_matching(useful)
    joined = [a | b for a, b in matched]
    rest = set(graph.nodes) - {part for pair in matched for part in pair}
    return joined + [part for part in graph.nodes if part in rest]


def same_input(problem: Problem, price: float) -> list[Part]:
    """First join slices that read one activation, family with family, where that pays over all
    layers together; then runs of layers of the joined families.

    Of many families, which heads are, blocks are joined two by two, first those of one projection,
    and not where next to nothing is paid for: candidates then grow with their number, not with its
    square.
    """
    rows = _families(problem, problem.singletons())
    blocks = [frozenset({at}) for at in range(len(rows))]
    joint = _joint_blocks(problem, rows)
    dear = paid_share(problem, rows, price) >= LEAST_SHARE
    merged = True
    while merged:
        merged = False
        options = []
        joins = [joint.get(_read(problem, row)) for row in rows]
        for a, b in itertools.combinations(range(len(rows)), 2):
            may = joins[a]
            many = may is not None
            if may is not None and not (dear and blocks[a] | blocks[b] in may):
                continue
            both = _zip_rows(problem, rows[a], rows[b])
            if both is None:
                continue
            apart = sum(problem.value(p, price) for p in rows[a] + rows[b])
            gain = apart - sum(problem.value(p, price) for p in both)
            if gain > (LEAST_GAIN * apart if many else 0):
                options.append((gain, a, b, both))
        if options:
            _, a, b, both = max(options, key=lambda option: option[0])
            rows = [both if i == a else row for i, row in enumerate(rows) if i != b]
            union = blocks[a] | blocks[b]
            blocks = [union if i == a else one for i, one in enumerate(blocks) if i != b]
            merged = True
    return _grown(problem, price, rows)


def _read(problem: Problem, row: Sequence[Part]) -> Hashable:
    """What a row of parts reads, told by its first layer."""
    return problem.nodes[min(row[0])].input


def _joint_blocks(
    problem: Problem, rows: Sequence[Sequence[Part]]
) -> dict[Hashable, set[frozenset[int]]]:
    """Of every input that many rows read, the blocks that these may be joined in: a binary tree
    over the rows of each projection (labels that differ in a number at the end), and one over
    these trees."""
    readers: dict[Hashable, dict[tuple[str, str], list[frozenset[int]]]] = {}
    for at, row in enumerate(rows):
        node = problem.nodes[min(row[0])]
        projection = (node.type, node.label.rstrip("0123456789"))
        readers.setdefault(node.input, {}).setdefault(projection, []).append(frozenset({at}))
    found = {}
    for read, projections in readers.items():
        if sum(map(len, projections.values())) > _MANY_FAMILIES:
            found[read] = set[frozenset[int]]()
            _pair_up(
                [_pair_up(leaves, found[read]) for leaves in projections.values()], found[read]
            )
    return found


def _pair_up(blocks: list[frozenset[int]], joint: set[frozenset[int]]) -> frozenset[int]:
    """Join neighbours two by two until one block is left; what was joined goes into ``joint``."""
    while len(blocks) > 1:
        blocks = [frozenset[int]().union(*blocks[at : at + 2]) for at in range(0, len(blocks), 2)]
        joint.update(blocks)
    return blocks[0]


def _zip_rows(problem: Problem, left: list[Part], right: list[Part]) -> list[Part] | None:
    """The rows joined layer by layer, if every layer's parts read the same activation."""
    if len(left) != len(right):
        return None
    both = []
    for a, b in zip(left, right, strict=True):
        if len({problem.nodes[name].input for name in a | b}) > 1 or not problem.may_join(a | b):
            return None
        if not problem.considers(a | b):
            return None
        both.append(a | b)
    return both


def agglomerative(problem: Problem, price: float) -> list[Part]:
    """Join the neighbours that gain most until none gains, then move single slices between
    neighbouring groups while that helps (Kernighan & Lin 1970; Fiduccia & Mattheyses 1982)."""
    parts = problem.singletons()
    finest = list(parts)
    while True:
        best_gain, best = 0.0, None
        for a, b in problem.neighbours(parts):
            both = a | b
            if not problem.may_join(both):
                continue
            gain = problem.value(a, price) + problem.value(b, price) - problem.value(both, price)
            if gain > best_gain:
                best_gain, best = gain, (a, b)
        if best is None:
            break
        parts = [p for p in parts if p not in best] + [best[0] | best[1]]
    return _local_moves(problem, price, parts, finest)


def _local_moves(
    problem: Problem, price: float, parts: list[Part], finest: list[Part]
) -> list[Part]:
    moved = True
    while moved:
        moved = False
        for piece in finest:
            home = next(p for p in parts if piece <= p)
            rest = home - piece
            if rest and not problem.may_join(rest):
                continue  # it is what links the others
            before = problem.value(home, price)
            without = problem.value(rest, price) if rest else 0.0
            options: list[tuple[float, Part | None]] = []
            if rest:
                options.append((before - without - problem.value(piece, price), None))
            for other in parts:
                if other == home or not problem.may_join(other | piece):
                    continue
                both = problem.value(other | piece, price)
                options.append((before + problem.value(other, price) - without - both, other))
            if not options:
                continue
            gain, target = max(options, key=lambda option: option[0])
            if gain > 1e-12 * max(before, 1e-300):
                parts = [p for p in parts if p not in (home, target)]
                parts += [p for p in (rest, piece | (target or frozenset())) if p]
                moved = True
    return parts


def exhaustive(problem: Problem, price: float) -> list[Part]:
    """The best of all set partitions into parts that may be groups; for a handful of slices.

    Exact in ``O(3ⁿ)``: the best partition of a set is the best part that has its first element, and
    the best partition of the rest.
    """
    items = problem.singletons()
    if len(items) > MOST_ENUMERATED:
        raise PlanError(
            f"strategy exhaustive: {len(items)} slices have too many partitions; it takes at most "
            f"{MOST_ENUMERATED}. Match fewer weights, or use agglomerative, grown or layers"
        )
    whole = (1 << len(items)) - 1
    worth: dict[int, tuple[float, Part]] = {}
    for mask in range(1, whole + 1):
        part = frozenset[str]().union(*(x for at, x in enumerate(items) if mask >> at & 1))
        if problem.may_join(part):
            worth[mask] = (problem.value(part, price), part)
    for key, other in problem.others.items():
        mask = sum(1 << at for at, x in enumerate(items) if x <= other.slices)
        value = problem.value(key, price)
        if mask not in worth or value < worth[mask][0]:
            worth[mask] = (value, key)
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for mask in range(1, whole + 1):
        first, least = mask & -mask, (float("inf"), 0)
        # of equal values, up to rounding, the smaller part, whatever the losses are scaled by
        for taken in sorted(_submasks(mask), key=int.bit_count):
            if taken & first and taken in worth:
                value = worth[taken][0] + best[mask ^ taken][0]
                if value < least[0] * (1 - _TIE):
                    least = value, taken
        best[mask] = least
    parts = []
    mask = whole
    while mask:
        taken = best[mask][1]
        parts.append(worth[taken][1])
        mask ^= taken
    return parts


def _submasks(mask: int) -> Iterator[int]:
    """All non-empty subsets of a set of bits."""
    taken = mask
    while taken:
        yield taken
        taken = (taken - 1) & mask


def auto(problem: Problem, price: float) -> list[Part]:
    """The best of the others at this price."""
    # a family with several slices a layer (experts) is one part a layer to `layers`
    tried: list[Strategy] = [separate, grown, same_input]
    count = len(problem.singletons())
    if count <= MOST_EXHAUSTIVE:
        tried = [exhaustive]
    elif count <= _MOST_AGGLOMERATIVE:
        tried.append(agglomerative)
    found = [strategy(problem, price) for strategy in tried]
    return min(found, key=lambda parts: sum(problem.value(p, price) for p in parts))


def mixed_in(strategy: str, problem: Problem, price: float, parts: list[Part]) -> list[Part]:
    """The best of a strategy's partition and of those in which candidates of other kinds take
    slices; what looks at all partitions has looked at them."""
    count = len(problem.singletons())
    whole = strategy == "exhaustive" or (strategy == "auto" and count <= MOST_EXHAUSTIVE)
    if whole and not problem.insists:
        return parts
    return mixed(problem, price, parts, _families(problem, problem.singletons()), strategy)


STRATEGIES: dict[str, Strategy] = {
    "separate": separate,
    "layers": layers,
    "grown": grown,
    "pairs": pairs,
    "same_input": same_input,
    "agglomerative": agglomerative,
    "exhaustive": exhaustive,
    "auto": auto,
}
