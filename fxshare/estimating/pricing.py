"""What pricing candidates, and making the factors of plans, takes.

Legend: I input features, O outputs of all members, N the smaller of the two, R rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxshare.calibration.gradients import is_diagonal, is_projected
from fxshare.cost_model.pace import NOTHING, Amount, Pace, Precision
from fxshare.sites.site import Site, SliceSpec

_ORTHOGONAL = 80
"""Vectors that each of the 40 steps towards a largest eigenvalue goes through."""
_CALLS = 300
"""Operations of a candidate that do next to nothing, its curve included."""
_MANY = 8
_SINGLE = 0.6
"""Of an eigenproblem's time in float64, what it takes in float32."""


@dataclass(frozen=True)
class Member:
    """One slice of a candidate."""

    site: Site
    slice: SliceSpec
    read: Hashable

    @property
    def inputs(self) -> int:
        """``I``."""
        return self.site.in_features

    @property
    def outputs(self) -> int:
        """Its own outputs."""
        return self.slice.out_features


Candidate = tuple[Member, ...]


@dataclass(frozen=True)
class Candidates:
    """The candidates that are certainly asked for: every slice alone, every two neighbours of a
    family, every family whole, and slices that read one input joined."""

    alone: Sequence[Candidate]
    shared: Sequence[Candidate]

    def __len__(self) -> int:
        return len(self.alone) + len(self.shared)


def candidates(
    sites: Sequence[Site], reads: Mapping[str, Hashable], *, strategy: str, merged: bool
) -> Candidates:
    """What the strategy prices. ``merged`` joins types that read one input as well, as a trial
    does."""
    members = [Member(x, s, reads[x.name]) for x in sites if x.calls for s in x.slices]
    alone = [(one,) for one in members]
    if strategy == "separate":
        return Candidates(alone, ())
    rows: dict[Hashable, list[Member]] = {}
    for one in members:
        family = (one.site.type, one.slice.label, one.inputs)
        rows.setdefault(family, []).append(one)
    families = [_by_layer(row) for row in rows.values()]
    shared: list[Candidate] = [c for row in families for c in _runs(row, strategy)]
    if strategy in ("auto", "same_input", "agglomerative", "exhaustive") or merged:
        shared += _joined(families, strategy, merged)
    return Candidates(alone, list(dict.fromkeys(shared)))


def _by_layer(row: Sequence[Member]) -> list[Candidate]:
    found: dict[int | None, Candidate] = {}
    for at, one in enumerate(row):
        layer = one.site.layer if one.site.layer is not None else -1 - at
        found[layer] = (*found.get(layer, ()), one)
    return [found[layer] for layer in sorted(found, key=lambda n: (n is None, n))]


def _runs(row: Sequence[Candidate], strategy: str) -> list[Candidate]:
    lengths = range(2, len(row) + 1) if strategy == "layers" else {2, len(row)} - {1}
    if strategy == "pairs":
        lengths = {2}
    several = [part for part in row if len(part) > 1]
    return several + [
        sum(row[start : start + n], ())
        for n in sorted(lengths)
        for start in range(len(row) - n + 1)
    ]


def _joined(
    families: Sequence[Sequence[Candidate]], strategy: str, merged: bool
) -> list[Candidate]:
    """Of families that read one input in every layer: all pairs of a few, and neighbours of many,
    as joined heads are, once more for what those pairs are joined to."""
    together: dict[Hashable, list[Sequence[Candidate]]] = {}
    for row in families:
        first = row[0][0]
        kind = first.read if merged else (first.site.type, first.read)
        together.setdefault(kind, []).append(row)
    found: list[Candidate] = []
    for same in together.values():
        if len(same) < 2:
            continue
        joins = zip(same[::2], same[1::2], strict=False)
        if len(same) <= _MANY:
            joins = ((a, b) for at, a in enumerate(same) for b in same[at + 1 :])  # type: ignore[assignment]
        for a, b in joins:
            both = [x + y for x, y in zip(a, b, strict=False)]
            found += both
    return found


@dataclass(frozen=True)
class Terms:
    """What the price of a candidate depends on beside its sizes.

    ``singular`` are the widths of inputs whose moments have no triangular root: those behind a
    LayerNorm, and those of fewer tokens than features. ``readers`` is how many slices read an
    input: they share its root, unless roots are too large to be kept (``tight``).
    """

    pace: Pace
    singular: frozenset[int]
    readers: Mapping[Hashable, int]
    tight: bool = False
    kind: Precision = "double"
    """What groups are priced in."""

    def eigen(self, found: Amount) -> Amount:
        """An eigenproblem that takes so long in float64."""
        return found * _SINGLE if self.kind == "single" else found

    def roots(self, part: Candidate) -> float:
        """How many roots of its inputs a candidate takes."""
        if self.tight or len({one.read for one in part}) > 1:
            return 1.0
        return 1 / max(self.readers[part[0].read], 1)

    def input_root(self, size: int) -> Amount:
        """Of a damped moment: its largest eigenvalue, whether it is singular, and the root, by
        eigenvectors where it is."""
        found = largest(self.pace, size) + self.pace.root(size)
        if size in self.singular:
            return found + self.pace.eigenvectors(size) * 1.6
        return found + self.pace.root(size)


def price(terms: Terms, part: Candidate, *, aware: bool) -> Amount:
    """The spectrum of a candidate; of a slice alone with the eigenvectors, which serve its
    factors."""
    pace, inputs, outputs = terms.pace, part[0].inputs, sum(one.outputs for one in part)
    kind, found = terms.kind, pace.calls(_CALLS)
    if outputs < inputs:
        for one in part:
            if aware:
                found += output_root(pace, one.outputs) if len(part) == 1 else NOTHING
                found += pace.product(one.outputs, one.outputs, inputs, kind)
        shared = len({one.read for one in part}) == 1 and terms.readers[part[0].read] > 1
        if len(part) == 1 or not shared:
            found += pace.product(outputs, inputs, inputs, kind)
        found += pace.triangle(outputs, inputs, kind)
    else:
        found += weighted(pace, part[-1], aware=aware, kind=kind)
        found += terms.input_root(inputs) * terms.roots(part)
        # a congruence: two products, of either about half
        found += pace.triangle(inputs, inputs, kind) * 2 + pace.moved(8 * 4 * inputs * inputs)
    size = min(inputs, outputs)
    alone = len(part) == 1
    return found + terms.eigen(pace.eigenvectors(size) if alone else pace.eigenvalues(size))


def weighted(pace: Pace, one: Member, *, aware: bool, kind: Precision = "double") -> Amount:
    """``Wᵀ A W`` of a slice over its inputs."""
    inputs, outputs = one.inputs, one.outputs
    if not aware:
        return pace.product(inputs, outputs, inputs, kind)
    if is_projected(one.site, one.slice):
        return NOTHING
    product = pace.product(inputs, outputs, inputs, kind)
    if is_diagonal(one.site, one.slice):
        return product
    return product + pace.product(outputs, outputs, inputs, kind)


def largest(pace: Pace, size: int) -> Amount:
    """The largest eigenvalue: 40 steps, each orthogonal to the others."""
    if size <= 256:
        return pace.eigenvalues(size)
    moved = 8 * 40 * (size * size + _ORTHOGONAL * size)
    return pace.moved(moved, 8 * size * size) + pace.calls(400)


def output_root(pace: Pace, size: int) -> Amount:
    """Of an output moment."""
    return largest(pace, size) + pace.root(size) * 2


def make_factors(terms: Terms, part: Candidate, rank: int) -> Amount:
    """The factors of a group at a rank, of its decomposition."""
    pace, inputs, outputs = terms.pace, part[0].inputs, sum(one.outputs for one in part)
    found = pace.calls(_CALLS)
    if outputs < inputs:
        found += pace.product(rank, outputs, inputs) + pace.product(outputs, outputs, rank)
        if terms.readers[part[0].read] > 1 and terms.tight:
            found += pace.product(outputs, inputs, inputs)
    else:
        if terms.tight:
            found += terms.input_root(inputs)
        # a triangular system, the root times the vectors, and the coefficients
        found += pace.product(rank, inputs, inputs) * 1.5 + pace.product(outputs, inputs, rank)
    return found + pace.moved(8 * 6 * (rank * (inputs + outputs) + inputs * outputs))


def decomposition_bytes(parts: Sequence[Candidate]) -> int:
    """Of the eigenvectors of these candidates."""
    return sum(8 * _size(part) ** 2 for part in parts)


def filed_bytes(parts: Sequence[Candidate], dtype: torch.dtype) -> int:
    """Of the factors of these candidates at every rank, to judge plans of a model in a dtype by."""
    if dtype == torch.float64:
        return 0
    itemsize = 2 if dtype == torch.bfloat16 else 4
    widths = ((one, one[0].inputs + sum(member.outputs for member in one)) for one in parts)
    return sum(itemsize * _size(one) * width for one, width in widths)


def written_bytes(
    parts: Sequence[Candidate], dtype: torch.dtype, spectra: int, least: int = 256
) -> int:
    """What of their eigenvectors goes to a work folder, for so many spectra; those of the factors
    that are kept are in float64, but for a bfloat16 model."""
    numbers = sum(_size(part) ** 2 for part in parts if _size(part) >= least)
    if dtype == torch.float64:
        return 8 * spectra * numbers
    return (4 * spectra + (0 if dtype == torch.bfloat16 else 8)) * numbers


def _size(part: Candidate) -> int:
    return min(part[0].inputs, sum(one.outputs for one in part))


def rank_of(inputs: int, outputs: int, keep: float, *, pivoted: bool = True) -> int:
    """The rank at which a share of a weight's numbers is stored."""
    full = min(inputs, outputs)
    if not pivoted:
        return max(int(keep * inputs * outputs / (inputs + outputs)), 1)
    both = inputs + outputs
    root = math.sqrt(max(both * both - 4 * keep * inputs * outputs, 0.0))
    return max(min(int((both - root) / 2), full), 1)


def readers_of(parts: Sequence[Candidate]) -> Counter[Hashable]:
    """How many slices read every input."""
    return Counter(part[0].read for part in parts)


__all__ = [
    "Candidate",
    "Candidates",
    "Member",
    "Terms",
    "candidates",
    "decomposition_bytes",
    "filed_bytes",
    "make_factors",
    "price",
    "rank_of",
    "readers_of",
    "written_bytes",
]
