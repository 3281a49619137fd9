"""The shared basis, the first kind of candidate."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fxshare.cost_model import no_slower
from fxshare.planning.nodes import shape_of
from fxshare.planning.options import Options, Side, second_unit, unit_cost
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.rules import named_apart
from fxshare.planning.solver.curve import DENSE, Curve, Floats, allowed
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.planning.solver.solve import Solution
from fxshare.plans.bits import Bits, Rounded
from fxshare.plans.cost import Shape, ranks
from fxshare.plans.plan import Group
from fxshare.plans.storage import PLAIN, Storage, usable


@dataclass(frozen=True)
class BasisOption:
    """What a label of a basis candidate's curve stands for."""

    rank: int
    storage: Storage
    bits: Bits | None = None


@dataclass(frozen=True)
class DenseOption:
    """Dense, in few bits."""

    bits: Bits


class Priced(Protocol):
    """What tells the losses of groups."""

    def tails(self, part: frozenset[str]) -> Floats:
        """The loss of a group at every rank from 0."""


def make_problem(
    nodes: Mapping[str, Node],
    spectra: Priced,
    options: Options,
    *,
    known: Callable[[Part], bool] | None = None,
    rounding: RoundingPrice | None = None,
) -> Problem:
    """The partition problem with curves from spectra; where ``known`` is given, of those alone that
    are, single slices apart. ``rounding`` prices few bits, where the options have some.

    The curves' second unit is FLOPs, or with ``time_kept`` parts of the dense time.
    """
    alone = [shape_of(nodes, frozenset({name})) for name in nodes]
    side, limit = second_unit(alone, options)

    @functools.cache  # groups of one full rank have the same options
    def meanings(
        full_rank: int, storages: tuple[Storage, ...], widths: tuple[Bits | None, ...]
    ) -> tuple[BasisOption | DenseOption, ...]:
        rank = ranks(Shape(full_rank, full_rank), options.rank_multiple).tolist()
        low = [BasisOption(r, s, bits) for bits in widths for s in storages for r in rank]
        return (*low, *(DenseOption(bits) for bits in widths if bits is not None))

    covers = Covers(nodes, spectra, known)

    @functools.cache  # groups of one shape have the same costs: their curves share these arrays
    def axes(shape: Shape, untouched: bool) -> _Axes:
        return _axes(shape, options, side, untouched=untouched)

    def curve(part: Part, tails_of: Callable[[Part], Floats] = covers.tails) -> Curve:
        shape = shape_of(nodes, part)
        untouched = any(nodes[name].layer in options.keep_dense for name in part)
        whole = untouched or not options.shares_bases
        found = axes(shape, untouched)
        # dense loses nothing, but for what rounding does
        tails = np.zeros(0) if whole else tails_of(part)
        loss = np.zeros(found.options)
        loss[: len(found.ranks)] = tails[found.ranks]
        # that of several slices is the sum of theirs: a bound has it as well
        for block in found.blocks:
            assert rounding is not None
            loss[block.options] += rounding.factors(
                part, block.storage, block.bits, found.ranks[block.options]
            )
        for at, bits in found.dense:
            assert rounding is not None
            loss[at] = rounding.dense(part, bits)
        storages = usable(options.storages, looked_up=bool(shape.lookups))
        means = meanings(shape.full_rank, storages, options.bits)
        return Curve(found.cost, loss[found.kept], found.label, found.side, means)

    return Problem(
        nodes,
        curve,
        may_share=options.may_share,
        max_group=options.max_group,
        tie=options.tie,
        side_limit=limit,
        least_of=lambda part: curve(part, covers.least),
        known=known,
    )


def surely_priced(problem: Problem, options: Options, strategy: str) -> list[Part]:
    """The parts that a strategy prices first, whatever it finds: each slice by itself, and pairs of
    neighbours."""
    found = problem.singletons()
    if strategy != "separate":
        both = (a | b for a, b in problem.neighbours(found))
        found = found + [part for part in both if problem.may_join(part)]
    dense = {name for name, node in problem.nodes.items() if node.layer in options.keep_dense}
    return [part for part in found if not part & dense]


@dataclass(frozen=True)
class _Block:
    """The options of one storage in few bits."""

    options: slice
    storage: Storage
    bits: Bits


@dataclass(frozen=True, eq=False)
class _Axes:
    """What groups of one shape have in common: the options' costs and labels, the ranks of all that
    have one, which options are in few bits, how many there are, and which of them are left by floor
    and ceiling."""

    cost: NDArray[np.int64]
    label: NDArray[np.int64]
    side: NDArray[np.int64]
    ranks: NDArray[np.int64]
    blocks: tuple[_Block, ...]
    dense: tuple[tuple[int, Bits], ...]
    """Where dense options in few bits are, and in how many."""
    options: int
    kept: NDArray[np.int64]


def _axes(shape: Shape, options: Options, side: Side, *, untouched: bool) -> _Axes:
    """Of a shape; ``untouched`` only as it is, which no bits change either."""
    rank = ranks(shape, options.rank_multiple)
    none = np.array([0])
    costs, taken, labels, sides, blocks = [], [], [], [], []
    storages = usable(options.storages, looked_up=bool(shape.lookups))
    whole = untouched or not options.shares_bases
    widths = (None,) if untouched else options.bits
    first = 0
    forms = [(bits, storage) for bits in widths for storage in storages]
    for at, (bits, storage) in enumerate(() if whole else forms):
        cost = unit_cost(shape, rank, storage, options, bits=bits)
        keep = cost < unit_cost(shape, none, PLAIN, options, dense=True, bits=bits)[0]
        if options.never_slower:
            assert options.rates is not None
            keep &= no_slower(options.rates, shape, rank, storage, prompt=options.prompt)
        costs.append(cost[keep])
        taken.append(rank[keep])
        labels.append(at * len(rank) + np.flatnonzero(keep))
        sides.append(side(shape, rank[keep], storage))
        last = first + int(keep.sum())
        if bits is not None:
            blocks.append(_Block(slice(first, last), storage, bits))
        first = last
    dense = []
    few = [bits for bits in widths if bits is not None]
    for number, bits in enumerate((*few, *((None,) if None in widths else ()))):
        costs.append(unit_cost(shape, none, PLAIN, options, dense=True, bits=bits))
        labels.append(np.array([DENSE if bits is None else len(forms) * len(rank) + number]))
        sides.append(side(shape, none, None))
        if bits is not None:
            dense.append((first + number, bits))
    cost, label = np.concatenate(costs), np.concatenate(labels)
    full = float(unit_cost(shape, none, PLAIN, options, dense=True)[0])
    ceiling = None if options.ceiling >= 1.0 else options.ceiling * full
    kept = allowed(cost, label, least=options.floor * full, most=ceiling)
    ranks_taken = np.concatenate([*taken, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    return _Axes(
        cost[kept],
        label[kept],
        np.concatenate(sides)[kept],
        ranks_taken,
        tuple(blocks),
        tuple(dense),
        len(cost),
        kept,
    )


@dataclass(frozen=True, eq=False)
class Covers:
    """Losses of groups over several layers, held above what their parts lose.

    Under one input moment a basis for several layers loses at every rank at least what bases of
    that rank lose for two layers each, and for one (Ky Fan: the tail of a sum of positive matrices
    is at least the sum of the tails). A group's spectrum is taken under the mean of its layers'
    moments, and may fall below that, because a layer of large inputs then counts for less than it
    loses. Such curves are raised to it: of the raised ones it is a bound that costs no
    decomposition.
    """

    nodes: Mapping[str, Node]
    spectra: Priced
    known: Callable[[Part], bool] | None = None
    """Which spectra are at hand; where it is given, others than those of single layers are not
    asked for."""
    _by_layer: dict[Part, list[Part]] = field(default_factory=dict, repr=False)

    def tails(self, part: Part) -> Floats:
        """The loss of a part at every rank from 0."""
        found = self.spectra.tails(part)
        layers = self._layers(part)
        return found if len(layers) == 1 else np.maximum(found, self._cover(layers, len(found)))

    def least(self, part: Part) -> Floats:
        """Nowhere above :meth:`tails`, of three layers and more without a decomposition of it, and
        with ``known`` without any."""
        layers = self._layers(part)
        at_hand = self.known is None or self.known(part)
        if len(layers) == 1 or (len(layers) == 2 and at_hand):
            return self.tails(part)
        return self._cover(layers, shape_of(self.nodes, part).full_rank + 1)

    def _layers(self, part: Part) -> list[Part]:
        if part not in self._by_layer:
            self._by_layer[part] = self._divided(part)
        return self._by_layer[part]

    def _divided(self, part: Part) -> list[Part]:
        by_layer: dict[int, set[str]] = {}
        for name in part:
            by_layer.setdefault(self.nodes[name].layer, set()).add(name)
        return [frozenset(by_layer[layer]) for layer in sorted(by_layer)]

    def _cover(self, layers: Sequence[Part], length: int) -> Floats:
        """The most that disjoint pairs of neighbours, and what is left over, lose together."""
        if len(layers) == 2:
            return self._sum(layers, length)
        found = np.zeros(length)
        for first in (0, 1):
            pairs = [layers[at] | layers[at + 1] for at in range(first, len(layers) - 1, 2)]
            rest = frozenset[str]().union(*layers).difference(*pairs)
            found = np.maximum(found, self._sum([*pairs, *self._layers(rest)], length))
        return found

    def _sum(self, parts: Sequence[Part], length: int) -> Floats:
        found = np.zeros(length)
        for part in parts:
            tails = self.least(part)[:length]
            found[: len(tails)] += tails
        return found


def rounded_of(solution: Solution) -> tuple[Rounded, ...]:
    """The plan's dense slices in few bits."""
    return tuple(
        Rounded(
            bits=choice.meaning.bits,
            slices=tuple(sorted(choice.candidate.slices)),
            loss=choice.loss,
        )
        for choice in solution.choices
        if isinstance(choice.meaning, DenseOption)
    )


def groups_of(solution: Solution, nodes: Mapping[str, Node]) -> tuple[Group, ...]:
    """The plan's groups; slices that stay dense, or that another kind took, are in none."""
    groups = []
    for choice in solution.choices:
        option = choice.meaning
        if not isinstance(option, BasisOption):
            continue
        part = choice.candidate.slices
        members = sorted((nodes[n] for n in part), key=lambda n: (n.layer, n.site, n.name))
        shape = shape_of(nodes, part)
        types = list(dict.fromkeys(n.type for n in members))
        labels = list(dict.fromkeys(n.label for n in members))
        layers = tuple(sorted({n.layer for n in members if n.layer >= 0}))
        where = f"{layers[0]}_{layers[-1]}" if layers else members[0].site
        name = "_".join(filter(None, ["basis", *types, *(labels[:4]), where]))
        groups.append(
            Group(
                name=re.sub(r"\W", "_", name),
                type="+".join(types),
                label="+".join(labels),
                layers=layers,
                slices=tuple(n.name for n in members),
                in_features=shape.in_features,
                out_features=shape.out_features,
                rank=option.rank,
                storage=option.storage.name,
                bits=option.bits,
                loss=choice.loss,
            )
        )
    return named_apart(groups)
