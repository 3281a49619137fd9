"""Spectra of candidate groups: the loss of every rank at once.

Legend: I input features, O output features of a slice.

For slices ``W_i (O_i, I)`` with output statistics ``A_i`` and pooled input statistics ``G = S Sᵀ``
the least second-order loss increase at rank r is ``½ Σ_{k>r} σ_k²``, σ the singular values of the
stacked ``A_i^½ W_i S``: one eigenproblem of the smaller side per candidate
(:mod:`fxshare.factors.decompose`), no tall SVD.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshare.base.cache import write_entry
from fxshare.base.filed import Filed
from fxshare.base.processes import here
from fxshare.base.spent import part
from fxshare.calibration.gram import pooled_gram
from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.factors.decompose import (
    Decomposition,
    InputSide,
    OutputSide,
    Side,
    decompose,
    is_wide,
    leading_values,
    rounding,
    weighted_product,
)
from fxshare.factors.entries import (
    entry_of,
    options_key,
    read_decomposition,
    read_tails,
    write_decomposition,
)
from fxshare.factors.every_rank import EveryRank, every_rank
from fxshare.factors.factorise import Factors
from fxshare.factors.kept import Kept
from fxshare.factors.metric import OutputRoot, SliceStatistics, output_root
from fxshare.factors.triangles import mirrored

# rows of a decomposition from which on it is written
_LEAST_WRITTEN = 256
# of the room for what is kept, by kind
_DECOMPOSED, _MADE, _POOLED, _PRODUCTS, _IMAGES, _ROOTS = 0.35, 0.15, 0.25, 0.08, 0.12, 0.05


@dataclass(eq=False)
class Spectra:
    """Spectra of sets of slices, computed when first asked for.

    ``cache`` is a folder in which spectra are kept by content (weights and statistics), so that a
    second plan of the same model is free. With ``sketch`` only that many leading eigenvalues are
    computed, by block subspace iteration; the tail is then an upper bound: Ritz values never exceed
    the eigenvalues (Cauchy interlacing), and the trace is exact.
    """

    slices: Mapping[str, SliceStatistics]
    relative_floor: float = 1e-8
    cache: Path | None = None
    sketch: int | None = None
    seed: int = 0
    computed: int = 0
    name: str = ""
    """What tells the statistics apart from others that share the cache, where the cache is for one
    model and one set of data: what is kept goes by names then, decompositions too."""
    room: int = 1 << 30
    """Bytes for what is computed and may be asked for again."""
    filed: Filed | None = None
    """Where the factors of every rank go, for those in float32."""
    made: Kept[Any] = field(init=False)
    """What was made of these spectra and is kept with them."""
    _tails: dict[frozenset[str], NDArray[np.float64]] = field(default_factory=dict)
    _shared: dict[frozenset[str], NDArray[np.float64]] = field(default_factory=dict)
    """Those that another process or this one has computed beforehand, until they are asked for."""
    _every_rank: dict[tuple[str, ...], EveryRank] = field(default_factory=dict)
    _decompositions: Kept[Decomposition] = field(init=False)
    _pooled: Kept[Damping] = field(init=False)
    _roots: Kept[OutputRoot] = field(init=False)
    _images: Kept[Tensor] = field(init=False)
    _readers: Counter[object] | None = None
    _products: Kept[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.made = Kept(int(_MADE * self.room))
        # a plan takes those of all its groups in turn; where it takes rows, one decomposition each
        decomposed = _DECOMPOSED if self.filed is None else 0.0
        self._decompositions = Kept(int(decomposed * self.room), stays=decomposed > 0)
        self._pooled = Kept(int(_POOLED * self.room))
        self._products = Kept(int(_PRODUCTS * self.room))
        self._images = Kept(int(_IMAGES * self.room), stays=True)
        self._roots = Kept(int(_ROOTS * self.room))

    def share_inputs(self, other: Spectra) -> None:
        """Use the pooled Grams of spectra that have the same inputs, damped alike."""
        self._pooled = other._pooled

    def release(self) -> None:
        """Give back the memory of all but the spectra themselves; what is asked for again is made
        again."""
        for kept in (self._decompositions, self._pooled, self._roots, self._images, self._products):
            kept.clear()
        self.made.clear()
        for one in self.slices.values():
            one.release()

    def pooled(self, names: Sequence[str]) -> Damping:
        """The members' pooled Gram, the mean over distinct inputs, and its damping."""
        inputs = {self.slices[name].input: self.slices[name] for name in sorted(names)}
        size = 16 * self.slices[names[0]].weight_OI.shape[1] ** 2

        def make() -> Damping:
            if len(inputs) == 1:
                (alone,) = inputs.values()
                return Damping(alone.gram_II, self.relative_floor)
            # one at a time: those of all layers of a wide input are gigabytes
            one = pooled_gram(member.gram_II for member in inputs.values())
            return Damping(one, self.relative_floor)

        return self._pooled.get(frozenset(inputs), make, size)

    def factors(
        self, names: tuple[str, ...], rank: int, dtype: torch.dtype = torch.float64
    ) -> Factors:
        """The best factors of a group at a rank.

        The decomposition of a group serves every rank, so that the plans of a search, which differ
        in ranks more than in groups, do not repeat it. Directions that no input and no gradient
        takes are as good as any other in the metric: where a rank goes beyond the others, both
        moments are damped, and the weights decide. What the weights themselves lack is filled up
        with rows that nothing reads, so that every basis has full rank.
        """
        members = [self.slices[name] for name in names]
        limit = min(members[0].weight_OI.shape[1], sum(len(one.weight_OI) for one in members))
        if not 1 <= rank <= limit:
            raise FactoriseError(
                f"rank of {len(members)} weights: expected from 1 to {limit}, found {rank}"
            )
        if dtype == torch.float32 and self.filed is not None:
            every = self.every_rank(names)
            if rank <= every.significant and rank < limit:
                return every.factors(rank)
        whole = self.decomposition(names)
        # at full rank either form gives back weights that have it
        if rank > whole.significant and not (rank == limit and _have_rank(members, limit)):
            damped = self.decomposition(names, damped=True)
            return damped.factors(self._inputs(names, damped=True), rank, dtype)
        return whole.factors(self._left(names), rank, dtype)

    def every_rank(self, names: tuple[str, ...]) -> EveryRank:
        """The factors of a group at every rank, in float32."""
        found = self._every_rank.get(names)
        if found is None:
            assert self.filed is not None
            whole = self.decomposition(names)
            found, is_kept = every_rank(whole, self._left(names), self.filed)
            if is_kept:
                self._every_rank[names] = found
        return found

    def _left(self, names: tuple[str, ...]) -> Side:
        """The side of a group that is decomposed: what is left to do takes no moment of the inputs
        where that is its outputs."""
        members = [self.slices[name] for name in names]
        if is_wide(members):
            return OutputSide(members, [self._root(name) for name in names])
        return self._side(names)

    def decomposition(self, names: tuple[str, ...], *, damped: bool = False) -> Decomposition:
        """The decomposition of a group on its smaller side; with ``damped`` over its inputs, with
        both moments damped."""
        members = [self.slices[name] for name in names]
        size = members[0].weight_OI.shape[1]
        if not damped and is_wide(members):
            size = sum(len(one.weight_OI) for one in members)

        def make() -> Decomposition:
            stored = self._read_decomposition(names, damped)
            if stored is not None:
                return stored
            found = decompose(self._inputs(names, damped=True) if damped else self._side(names))
            self._write_decomposition(names, damped, found)
            return found

        return self._decompositions.get((names, damped), make, 8 * size * size)

    def _side(self, names: Sequence[str]) -> Side:
        members = [self.slices[name] for name in names]
        if not is_wide(members):
            return self._inputs(names)
        roots = [self._root(name) for name in names]
        if len({one.input for one in members}) == 1 and self._readers_of(members[0].input) > 1:
            images = [self._image(name, root) for name, root in zip(names, roots, strict=True)]
            return OutputSide(members, roots, images=images)
        return OutputSide(members, roots, self.pooled(names).moment)

    def _inputs(self, names: Sequence[str], *, damped: bool = False) -> InputSide:
        together: dict[object, list[str]] = {}
        for name in names:
            together.setdefault(self.slices[name].input, []).append(name)
        # one at a time: those of all layers of a wide input are gigabytes
        product_II = _total(self._product(tuple(part), damped) for part in together.values())
        return InputSide([self.slices[name] for name in names], self.pooled(names), product_II)

    def _readers_of(self, read: object) -> int:
        """How many slices that are by themselves wide read an input: heads are many."""
        if self._readers is None:
            self._readers = Counter(one.input for one in self.slices.values() if is_wide([one]))
        return self._readers[read]

    def _image(self, name: str, root: OutputRoot | None) -> Tensor:
        """``Rᵀ W G`` ``(O, I)`` of a slice. With it a group of slices that read one input takes no
        product over that input's moment."""
        one = self.slices[name]

        def make() -> Tensor:
            weight_OI = one.weight_OI.double()
            rooted_OI = weight_OI if root is None else root.apply(weight_OI)
            return rooted_OI @ self.pooled([name]).moment

        return self._images.get(name, make, 8 * one.weight_OI.numel())

    def _root(self, name: str) -> OutputRoot | None:
        """The root of a slice's output statistics; None where there are none."""
        known = self._roots.found(name)
        if known is not None:
            return known
        moment = self.slices[name].moment_OO  # expanded when it is asked for
        if moment is None:
            return None

        def make() -> OutputRoot:
            return output_root(moment, relative_floor=self.relative_floor)

        return self._roots.get(name, make, 16 * moment.numel())

    def _product(self, names: tuple[str, ...], damped: bool) -> Tensor:
        """``Σ Wᵀ A W`` ``(I, I)`` of slices that read one input."""
        size = 8 * self.slices[names[0]].weight_OI.shape[1] ** 2

        def make() -> Tensor:
            return _total(self._weighted(name, damped) for name in names)

        return self._products.get((names, damped), make, size)

    def _weighted(self, name: str, damped: bool) -> Tensor:
        one, added = self.slices[name], 0.0
        if damped and one.is_projected:
            # what is added decides between directions that nothing takes: its size is free
            added = self.relative_floor * one.trace
        elif damped and one.moment_OO is not None:
            added = Damping(one.moment_OO, self.relative_floor).floor
        return weighted_product(one, added)

    def tails(self, part: frozenset[str]) -> NDArray[np.float64]:
        """``½ Σ_{k>r} σ_k²`` for r = 0 .. min(I, O), descending to 0; computed once."""
        if part not in self._tails:
            shared = self._shared.pop(part, None)
            self._tails[part] = self._compute_tails(part) if shared is None else shared
        return self._tails[part]

    def is_computed(self, part: frozenset[str]) -> bool:
        """Whether a part's spectrum is at hand."""
        return part in self._tails

    def share(self, parts: Iterable[frozenset[str]]) -> None:
        """Of several processes let each compute the tails of some parts, and tell the others."""
        known = self._tails.keys() | self._shared.keys()
        missing = [part for part in dict.fromkeys(parts) if part not in known]
        together = here()
        if together.size == 1 or not missing:
            return
        found = together.spread(missing, self._compute_tails, owner=self.owner, at="spectra")
        for names, tails in zip(missing, found, strict=True):
            self._shared[names] = tails
            self._write(self._key(tuple(sorted(names))), tails)

    def owner(self, names: Iterable[str]) -> int:
        """Which of several processes decomposes a group, modulo their number."""
        return min(map(list(self.slices).index, names))

    @part("spectra")
    def _compute_tails(self, part: frozenset[str]) -> NDArray[np.float64]:
        names = tuple(sorted(part))
        key = self._key(names)
        stored = self._read(key)
        if stored is not None:
            return stored
        self.computed += 1
        side = self._side(names)
        out, features = sum(len(one.weight_OI) for one in side.members), side.features
        full = min(features, out)
        if self.sketch is not None and self.sketch < full // 2:
            matrix = side.matrix()
            total = float(matrix.diagonal().sum())
            leading = leading_values(mirrored(matrix), self.sketch, self.seed)
        elif len(names) == 1:
            # what is not shared is factorised at some rank in almost every plan
            whole = self.decomposition(names) if self.filed is None else self.every_rank(names)
            leading = whole.spectrum
            total = float(leading.sum())
        else:
            matrix = side.matrix()
            total = float(matrix.diagonal().sum())
            leading = torch.linalg.eigvalsh(matrix).flip(0)
        values = leading.clamp(min=0).cpu().numpy()
        tail = np.zeros(full + 1)
        tail[: len(values) + 1] = total - np.concatenate([[0.0], np.cumsum(values)])
        # beyond the sketch the tail is not known: it stays at its last value, and is 0 at full rank
        tail[len(values) + 1 : full] = tail[len(values)]
        tail[full] = 0.0
        # what rounding leaves of the eigenvalues is no loss: a curve of it would make the planner
        # pay for ranks that the weights do not have
        tail[tail < rounding(full) * total] = 0.0
        found: NDArray[np.float64] = 0.5 * np.minimum.accumulate(tail)
        self._write(key, found)
        return found

    @property
    def key_of_options(self) -> str:
        """What spectra depend on beside statistics and weights, and the name of those."""
        return options_key(self.name, self.relative_floor, self.sketch, self.seed)

    def _read_decomposition(self, names: tuple[str, ...], damped: bool) -> Decomposition | None:
        if self.cache is None or not self.name:
            return None
        return read_decomposition(self.cache, self._decomposed_as(names, damped), self._device())

    def _write_decomposition(
        self, names: tuple[str, ...], damped: bool, found: Decomposition
    ) -> None:
        # what takes no time is not worth a file: the heads of a large model are thousands
        if self.cache is not None and self.name and len(found.spectrum) >= _LEAST_WRITTEN:
            write_decomposition(self.cache, self._decomposed_as(names, damped), found)

    def _decomposed_as(self, names: tuple[str, ...], damped: bool) -> str:
        return f"{self._key(names)}.{'damped' if damped else 'vectors'}"

    def _device(self) -> torch.device:
        return next(iter(self.slices.values())).weight_OI.device

    def _key(self, names: tuple[str, ...]) -> str | None:
        if self.cache is None:
            return None
        if self.name:
            return entry_of(self.key_of_options, names)
        digest = hashlib.sha256(f"{self.relative_floor} {self.sketch} {self.seed}".encode())
        inputs = [self.slices[name].input for name in names]
        for name in names:
            one = self.slices[name]
            # the Gram is pooled over distinct inputs: which members have the same one counts too
            shape, number = tuple(one.weight_OI.shape), inputs.index(one.input)
            kinds = f"{one.moment_OO is None} {one.is_projected}"
            digest.update(f"{shape} {number} {kinds}".encode())
            for t in (one.weight_OI, one.gram_II, one.moment_OO, one.product_II):
                if t is not None:
                    digest.update(t.detach().double().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _read(self, key: str | None) -> NDArray[np.float64] | None:
        if key is None or self.cache is None:
            return None
        return read_tails(self.cache, key)

    def _write(self, key: str | None, tails: NDArray[np.float64]) -> None:
        if key is None or self.cache is None:
            return
        write_entry(self.cache, f"{key}.spectrum", tails.astype(np.float64).tobytes())


def _total(products: Iterable[Tensor]) -> Tensor:
    """The sum; the products themselves stay as they are, and one alone is not copied."""
    found: Tensor | None = None
    own = False
    for one in products:
        if found is None:
            found = one
        else:
            found, own = (found.add_(one) if own else found + one), True
    assert found is not None
    return found


def _have_rank(members: Sequence[SliceStatistics], rank: int) -> bool:
    stacked_OI = torch.cat([one.weight_OI.double() for one in members])
    return int(torch.linalg.matrix_rank(stacked_OI)) >= rank
