"""The partition problem: slices as nodes of a networkx graph, edges between what may share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import networkx as nx
import numpy as np

from fxshare.errors import PlanError
from fxshare.planning.solver.curve import Curve, Floats

Part = frozenset[str]
"""Names of the slices of one group."""


@dataclass(frozen=True)
class Node:
    """A slice as the planner sees it. ``input`` is equal for slices that read one activation."""

    name: str
    site: str
    type: str
    label: str
    layer: int
    head: int | None
    in_features: int
    out_features: int
    input: Hashable
    lookups: int = 0
    """Embeddings that look its rows up."""
    multiplied: bool = True
    """Whether anything multiplies by it; not so for an embedding by itself."""

    @property
    def family(self) -> tuple[str, str, int]:
        """Slices of one family may share across layers."""
        return (self.type, self.label, self.in_features)


class Candidate(Protocol):
    """A way to store some slices: its curve of loss against cost, and the kind of thing it is."""

    @property
    def key(self) -> Part: ...
    @property
    def slices(self) -> Part: ...
    @property
    def curve(self) -> Curve: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True, eq=False)
class SharedBasis:
    """One basis for all its slices; the first kind of candidate."""

    slices: Part
    curve: Curve
    kind: str = "basis"

    @property
    def key(self) -> Part:
        """What it is called in a partition."""
        return self.slices


@dataclass(frozen=True, eq=False)
class Other:
    """A candidate of another kind: it takes all its slices, which are in no group then. ``of`` is
    what it means to whoever made it."""

    name: str
    slices: Part
    curve: Curve
    kind: str
    of: object = None

    @property
    def key(self) -> Part:
        """What it is called in a partition: a part that has no slice, since a group of the same
        slices is something else."""
        return frozenset({f"\0{self.kind} {self.name}"})


@dataclass(eq=False)
class Problem:
    """Nodes, which of them may meet, and where candidates' curves come from.

    ``curve_of`` is called once per distinct part, when a strategy first asks for it: spectra are
    computed lazily. ``may_share`` lists sets of weight types that may meet in one basis; by default
    a type only meets itself. ``side_limit`` bounds the sum of the curves' ``side``. ``least_of``
    gives a curve of the same costs that is nowhere above a part's own, without pricing the part;
    where there is none, whoever asks for a bound has the part priced. ``known`` says of which parts
    the price is at hand; where it is given, runs and joins of others are not considered beyond
    their bounds.
    """

    nodes: Mapping[str, Node]
    curve_of: Callable[[Part], Curve]
    may_share: Sequence[frozenset[str]] = ()
    max_group: int | None = None
    tie: Sequence[Part] = ()
    side_limit: float | None = None
    least_of: Callable[[Part], Curve] | None = None
    known: Callable[[Part], bool] | None = None
    others: Mapping[Part, Other] = field(default_factory=dict)
    """Candidates of other kinds, by their keys (:attr:`Other.key`)."""
    insists: bool = False
    """Whether they are taken wherever there are some, to be judged."""
    _known: dict[Part, SharedBasis] = field(init=False, default_factory=dict)
    _joins: dict[Part, bool] = field(init=False, default_factory=dict)
    _values: dict[Part, list[float]] = field(init=False, default_factory=dict)
    _at: dict[float, int] = field(init=False, default_factory=dict)
    _bounds: dict[float, float] = field(init=False, default_factory=dict)
    _bounded: set[Part] = field(init=False, default_factory=set)
    grown: dict[tuple[Part, ...], Any] = field(init=False, default_factory=dict)
    """What :mod:`fxshare.planning.solver.grow` found for rows of layers, at the fixed prices."""
    collected: dict[str, Any] = field(init=False, default_factory=dict)
    """What :mod:`fxshare.planning.solver.solve` collected with each strategy, for all budgets."""
    prices: Floats = field(init=False, default_factory=lambda: np.zeros(0))
    """The prices that were fixed; see :meth:`fix_prices`."""

    def candidate(self, part: Part) -> Candidate:
        """The candidate of a part, made on first use."""
        if part in self.others:
            return self.others[part]
        if part not in self._known:
            self._known[part] = SharedBasis(part, self.curve_of(part))
        return self._known[part]

    def value(self, part: Part, price: float) -> float:
        """``f_λ(part) = min over ranks of loss + λ · cost``."""
        at = self._at.get(price)
        if at is None:
            return self.candidate(part).curve.value(price)
        values = self._values.get(part)
        if values is None:
            values = self._values[part] = self.candidate(part).curve.values(self.prices).tolist()
        return values[at]

    def fix_prices(self, prices: Sequence[float]) -> None:
        """Say which prices will be asked for, so that a part's values are computed together."""
        self.prices = np.asarray(prices, dtype=np.float64)
        self._at = {float(price): at for at, price in enumerate(prices)}
        self._values, self.grown = {}, {}

    def covered(self, part: Part) -> Part:
        """The slices of a part of a partition."""
        return self.others[part].slices if part in self.others else part

    def is_priced(self, part: Part) -> bool:
        """Whether a part's own curve is known."""
        return part in self._known

    def considers(self, part: Part) -> bool:
        """Whether a part may be priced."""
        return self.known is None or part in self._known or self.known(part)

    def least(self, part: Part, prices: Floats) -> Floats:
        """Values that the part's own are nowhere below, at several prices; its own where it is
        priced already, or where there is no bound."""
        if self.least_of is None or self.is_priced(part):
            return self.candidate(part).curve.values(prices)
        self._bounded.add(part)
        return self.least_of(part).values(prices)

    def note_bound(self, price: float, value: float) -> None:
        """Say that partitions were considered at a price without pricing all of their parts, and
        that none of them has a value below this one."""
        self._bounds[price] = min(value, self.bound(price))

    def bound(self, price: float) -> float:
        """The least of all noted bounds at a price."""
        return self._bounds.get(price, float("inf"))

    @property
    def unpriced(self) -> int:
        """Of how many parts only a bound was asked for."""
        return len(self._bounded - self._known.keys())

    def seen(self) -> Iterable[Candidate]:
        """Every candidate asked for so far."""
        return self._known.values()

    def may_meet(self, a: Node, b: Node) -> bool:
        """Whether two slices may be in one group."""
        if a.in_features != b.in_features:
            return False
        if a.type == b.type:
            return a.label == b.label or a.input == b.input
        return any({a.type, b.type} <= types for types in self.may_share)

    def may_join(self, part: Part) -> bool:
        """Whether slices may be one group: any two types may meet, and pairs of slices that may
        meet link all of them. (Heads 0 and 1 of a layer, and head 0 of the next, may be one group
        although head 1 and the next layer's head 0 may not meet alone.) What is tied always may.
        """
        if part not in self._joins:
            self._joins[part] = self.allowed(part) and self._linked(part)
        return self._joins[part]

    def _linked(self, part: Part) -> bool:
        tied = [names for names in self.tie if names <= part]
        meeting = [*self.may_share, *(frozenset(self.nodes[n].type for n in t) for t in tied)]
        types = {self.nodes[name].type for name in part}
        if not all(any({a, b} <= m for m in meeting) for a, b in itertools.combinations(types, 2)):
            return False
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(part)
        for names in tied:
            nx.add_path(graph, names)
        graph.add_edges_from(
            (a, b)
            for a, b in itertools.combinations(part, 2)
            if self.may_meet(self.nodes[a], self.nodes[b])
        )
        return bool(nx.is_connected(graph))

    def allowed(self, part: Part) -> bool:
        """Whether a part keeps to the largest group (in layers)."""
        if self.max_group is None:
            return True
        return len({self.nodes[name].layer for name in part}) <= self.max_group

    def singletons(self) -> list[Part]:
        """The finest partition: one slice a part, tied slices together."""
        tied: dict[str, Part] = {}
        for part in self.tie:
            unknown = sorted(part - set(self.nodes))
            if unknown:
                raise PlanError(f"tie: {unknown[0]!r} is not a slice of the plan")
            widths = {self.nodes[name].in_features for name in part}
            if len(widths) > 1:
                raise PlanError(
                    f"tie: {sorted(part)[:2]} read inputs of different width {sorted(widths)}; "
                    "only slices of one input width can share a basis"
                )
            for name in part:
                if name in tied:
                    raise PlanError(f"tie: {name!r} is in two ties; join them into one")
                tied[name] = part
            if not self.allowed(part):
                raise PlanError(
                    f"tie: {len(part)} slices over more layers than max_group {self.max_group}"
                )
        return list(dict.fromkeys(tied.get(name, frozenset({name})) for name in self.nodes))

    def graph(self, price: float) -> nx.Graph[Part]:
        """The graph at a price: edges join neighbours that may share, weighted by what sharing
        them saves, ``f(u) + f(v) − f(u ∪ v)``.

        Neighbours are consecutive layers of one family, and among slices that read the same
        activation each and the next that it may meet: a number of edges linear in the slices, where
        all pairs would be quadratic in the heads.
        """
        graph: nx.Graph[Part] = nx.Graph()
        parts = self.singletons()
        for part in parts:
            first = self.nodes[min(part)]
            graph.add_node(
                part,
                site=first.site,
                type=first.type,
                layer=first.layer,
                head=first.head,
                in_features=first.in_features,
                out_features=sum(self.nodes[n].out_features for n in part),
            )
        for a, b in self.neighbours(parts):
            both = a | b
            if self.may_join(both):
                gain = self.value(a, price) + self.value(b, price) - self.value(both, price)
                graph.add_edge(a, b, weight=gain)
        return graph

    def neighbours(self, parts: Sequence[Part]) -> list[tuple[Part, Part]]:
        """Pairs of parts that may meet and are next to each other in layer or in input."""
        pairs: dict[frozenset[Part], tuple[Part, Part]] = {}
        home = {name: part for part in parts for name in part}
        rows: dict[Hashable, list[Node]] = {}
        # in the order of the slices, not of their names: "head.10" comes before "head.2"
        for node in sorted(self.nodes.values(), key=lambda node: node.layer):
            rows.setdefault(("family", node.family), []).append(node)
            rows.setdefault(("input", node.input), []).append(node)
        for row in rows.values():
            for at, node in enumerate(row):
                # between k and v, which may share, stands q, which may not
                other = next((o for o in row[at + 1 :] if self.may_meet(node, o)), None)
                if other is not None and home[node.name] != home[other.name]:
                    a, b = home[node.name], home[other.name]
                    pairs.setdefault(frozenset({a, b}), (a, b))
        return list(pairs.values())
