"""Spectra of candidate groups: the loss of every rank at once.

Legend: I input features, O output features of a slice.

For slices ``W_i (O_i, I)`` with output statistics ``A_i`` and pooled input statistics ``G = S Sᵀ``
the least second-order loss increase at rank r is ``½ Σ_{k>r} σ_k²``, σ the singular values of the
stacked ``A_i^½ W_i S``: one eigenproblem of the smaller side per candidate
(:mod:`fxshare.factors.decompose`), no tall SVD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.factors.decompose import (
    Decomposition,
    InputSide,
    OutputSide,
    Side,
    damped_product,
    decompose,
    have_rank,
    is_wide,
    leading_values,
    total,
    weighted_products,
)
from fxshare.factors.entries import (
    content_entry,
    entry_of,
    options_key,
    read_decomposition,
    read_tails,
    write_decomposition,
)
from fxshare.factors.every_rank import EveryRank, every_rank
from fxshare.factors.factorise import Factors
from fxshare.factors.kept import Kept
from fxshare.factors.metric import OutputRoot, SliceStatistics, output_root, pooled_moment
from fxshare.factors.tails import tails_of
from fxshare.factors.triangles import mirrored

# rows of a decomposition from which on it is written
_LEAST_WRITTEN = 256
# features from which on the moment of an input is not expanded to price a few slices
_WIDE = 1024
# products of a weight and a moment up to which it is not
_FEW = 9
# of the room for what is kept, by kind
_DECOMPOSED, _MADE, _POOLED, _GRAMS = 0.35, 0.09, 0.2, 0.08
_PRODUCTS, _IMAGES, _ROOTS = 0.08, 0.12, 0.08


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
    stored: torch.dtype = torch.float32
    """What those are kept in; where it is half precision all are decomposed as they are priced."""
    dtype: torch.dtype = torch.float64
    """What groups are priced in, and decomposed in to judge plans by; the factors that are kept in
    the end are float64 in any case."""
    made: Kept[Any] = field(init=False)
    """What was made of these spectra and is kept with them."""
    _tails: dict[frozenset[str], NDArray[np.float64]] = field(default_factory=dict)
    _shared: dict[frozenset[str], NDArray[np.float64]] = field(default_factory=dict)
    """Those that another process or this one has computed beforehand, until they are asked for."""
    _every_rank: dict[tuple[tuple[str, ...], torch.dtype], EveryRank] = field(default_factory=dict)
    _decompositions: Kept[Decomposition] = field(init=False)
    _pooled: Kept[Damping] = field(init=False)
    _roots: Kept[OutputRoot] = field(init=False)
    _images: Kept[Tensor] = field(init=False)
    _grams: Kept[Tensor] = field(init=False)
    _readers: Counter[object] | None = None
    _products: Kept[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.made = Kept(int(_MADE * self.room))
        # a plan takes those of all its groups in turn; where it takes rows, one decomposition each
        decomposed = _DECOMPOSED if self.filed is None else 0.0
        self._decompositions = Kept(int(decomposed * self.room), stays=decomposed > 0)
        self._pooled = Kept(int(_POOLED * self.room))
        self._products = Kept(int(_PRODUCTS * self.room))
        # what decompositions do not take of it images and moments do
        more = (_DECOMPOSED - decomposed) / 2
        self._images = Kept(int((_IMAGES + more) * self.room), stays=True)
        self._grams = Kept(int((_GRAMS + more) * self.room), stays=True)
        # those of heads are many and small, and asked for again with every run of layers
        roots = int(_ROOTS * self.room)
        self._roots = Kept(roots, stays=True, largest=roots // 16)

    def share_inputs(self, other: Spectra) -> None:
        """Use the pooled Grams of spectra that have the same inputs, damped alike."""
        self._pooled, self._images, self._grams = other._pooled, other._images, other._grams

    def release(self, share: float = 1.0) -> None:
        """Give back the memory of all but the spectra themselves; what is asked for again is made
        again, and that share of the room is for it."""
        asked = (self._decompositions, self._pooled, self._grams, self._images, self._products)
        for kept in (*asked, self._roots):
            kept.clear(share)
        self.made.clear(share)
        for one in self.slices.values():
            one.release()

    def pooled(self, names: Sequence[str]) -> Damping:
        """The members' pooled Gram, the mean over distinct inputs, and its damping."""
        size = 24 * self.slices[names[0]].weight_OI.shape[1] ** 2

        def make() -> Damping:
            return Damping(pooled_moment(self.slices, names), self.relative_floor)

        return self._pooled.get(frozenset(self.slices[name].input for name in names), make, size)

    def _gram(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """The members' pooled Gram in a dtype; one that is only multiplied by has no root."""
        if dtype == torch.float64:
            return self.pooled(names).moment

        def make() -> Tensor:
            return pooled_moment(self.slices, names).to(dtype)

        size = dtype.itemsize * self.slices[names[0]].weight_OI.shape[1] ** 2
        return self._grams.get(frozenset(self.slices[name].input for name in names), make, size)

    def factors(
        self, names: tuple[str, ...], rank: int, dtype: torch.dtype = torch.float64
    ) -> Factors:
        """The best factors of a group at a rank.

        The decomposition of a group serves every rank. Directions that no input and no gradient
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
            for fine in (self.dtype, torch.float64):
                every = self.every_rank(names, fine)
                if rank <= every.significant and rank < limit:
                    return every.factors(rank)
        if dtype == torch.float64 and self.stored != torch.float32:
            whole = self.decomposition(names, dtype=self.dtype)
            if rank <= whole.significant and rank < limit:
                return whole.factors(self._left(names), rank, dtype)
        whole = self.decomposition(names)
        # at full rank either form gives back weights that have it
        if rank > whole.significant and not (rank == limit and have_rank(members, limit)):
            damped = self.decomposition(names, damped=True)
            return damped.factors(self._inputs(names, damped=True), rank, dtype)
        return whole.factors(self._left(names), rank, dtype)

    def every_rank(self, names: tuple[str, ...], dtype: torch.dtype | None = None) -> EveryRank:
        """The factors of a group at every rank, in float32; decomposed in a ``dtype``, or in that
        of the prices."""
        dtype = dtype or self.dtype
        found = self._every_rank.get((names, dtype))
        if found is None:
            assert self.filed is not None
            whole = self.decomposition(names, dtype=dtype)
            found, is_kept = every_rank(whole, self._left(names), self.filed, self.stored)
            if is_kept:
                self._every_rank[names, dtype] = found
        return found

    def _left(self, names: tuple[str, ...]) -> Side:
        """The side of a group that is decomposed: what is left to do takes no moment of the inputs
        where that is its outputs."""
        members = [self.slices[name] for name in names]
        if is_wide(members):
            return OutputSide(members, [self._root(name) for name in names])
        return self._side(names)

    def decomposition(
        self, names: tuple[str, ...], *, damped: bool = False, dtype: torch.dtype = torch.float64
    ) -> Decomposition:
        """The decomposition of a group on its smaller side; with ``damped`` over its inputs, with
        both moments damped."""
        members = [self.slices[name] for name in names]
        size = members[0].weight_OI.shape[1]
        if not damped and is_wide(members):
            size = sum(len(one.weight_OI) for one in members)

        def make() -> Decomposition:
            folder, device = self.cache if self.name else None, members[0].weight_OI.device
            entry = self._decomposed_as(names, damped, dtype)
            stored = None if folder is None else read_decomposition(folder, entry, dtype, device)
            if stored is not None:
                return stored
            side = self._inputs(names, damped=True) if damped else self._side(names, dtype)
            found = decompose(side, dtype)
            # what takes no time is not worth a file: the heads of a large model are thousands
            if folder is not None and len(found.spectrum) >= _LEAST_WRITTEN:
                write_decomposition(folder, entry, found)
            return found

        key = names, damped, dtype
        return self._decompositions.get(key, make, dtype.itemsize * size * size)

    def _side(self, names: Sequence[str], dtype: torch.dtype = torch.float64) -> Side:
        members = [self.slices[name] for name in names]
        if not is_wide(members):
            return self._inputs(names, dtype=dtype)
        roots = [self._root(name) for name in names]
        inputs = {self.slices[name].input: name for name in names}
        if self._has_images(names, inputs.keys(), dtype):
            images = [self._image(name, tuple(inputs.values()), dtype) for name in names]
            return OutputSide(members, roots, images=images)
        return OutputSide(members, roots, self._gram(names, dtype))

    def _has_images(
        self, names: Sequence[str], inputs: Collection[object], dtype: torch.dtype
    ) -> bool:
        """Whether a group is priced by what its weights make of every input: where other slices
        read it as well, and where one is so wide that its moment takes longer to be expanded."""
        if len(inputs) == 1 and self._readers_of(next(iter(inputs))) > 1:
            return True
        width = self.slices[names[0]].weight_OI.shape[1]
        return dtype == torch.float32 and width >= _WIDE and len(names) * len(inputs) <= _FEW

    def _inputs(
        self,
        names: Sequence[str],
        *,
        damped: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> InputSide:
        together: dict[object, list[str]] = {}
        for name in names:
            together.setdefault(self.slices[name].input, []).append(name)
        # one at a time: those of all layers of a wide input are gigabytes
        product_II = total(self._product(tuple(part), damped, dtype) for part in together.values())
        return InputSide([self.slices[name] for name in names], self.pooled(names), product_II)

    def _readers_of(self, read: object) -> int:
        """How many slices that are by themselves wide read an input: heads are many."""
        if self._readers is None:
            self._readers = Counter(one.input for one in self.slices.values() if is_wide([one]))
        return self._readers[read]

    def _image(self, name: str, inputs: Sequence[str], dtype: torch.dtype) -> Tensor:
        """``W G`` ``(O, I)`` of a slice, G the mean over the inputs of some slices. With it a group
        of slices that read one input takes no product over that input's moment."""
        weight_OI = self.slices[name].weight_OI

        def image(other: str) -> Tensor:
            def make() -> Tensor:
                return self.slices[other].times_gram(weight_OI.to(dtype))

            key = name, self.slices[other].input, dtype
            return self._images.get(key, make, dtype.itemsize * weight_OI.numel())

        images = [image(other) for other in inputs]
        return images[0] if len(images) == 1 else total(images).div_(len(images))

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

    def _product(self, names: tuple[str, ...], damped: bool, dtype: torch.dtype) -> Tensor:
        """``Σ Wᵀ A W`` ``(I, I)`` of slices that read one input."""
        size = dtype.itemsize * self.slices[names[0]].weight_OI.shape[1] ** 2

        def make() -> Tensor:
            members = [self.slices[name] for name in names]
            if damped:
                return total(damped_product(one, self.relative_floor) for one in members)
            return weighted_products(members, dtype)

        return self._products.get((names, damped, dtype), make, size)

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
        side = self._side(names, self.dtype)
        out, features = sum(len(one.weight_OI) for one in side.members), side.features
        full = min(features, out)
        if self.sketch is not None and self.sketch < full // 2:
            matrix = side.matrix()
            whole = float(matrix.diagonal().sum())
            leading = leading_values(mirrored(matrix), self.sketch, self.seed)
            found = tails_of(leading, full, whole)
        elif len(names) == 1:
            # what is not shared is factorised at some rank in almost every plan
            kept = self.filed is not None
            one = self.every_rank(names) if kept else self.decomposition(names, dtype=self.dtype)
            found = tails_of(one.spectrum, full, dtype=self.dtype)
        else:
            leading = torch.linalg.eigvalsh(side.matrix(self.dtype)).flip(0)
            found = tails_of(leading, full, dtype=self.dtype)
        self._write(key, found)
        return found

    @property
    def key_of_options(self) -> str:
        """What spectra depend on beside statistics and weights, and the name of those."""
        return options_key(self.name, self.relative_floor, self.sketch, self.seed)

    def _decomposed_as(self, names: tuple[str, ...], damped: bool, dtype: torch.dtype) -> str:
        kind = "damped" if damped else "vectors"
        return f"{self._key(names)}.{kind}{'' if dtype == torch.float64 else '-single'}"

    def _key(self, names: tuple[str, ...]) -> str | None:
        if self.cache is None:
            return None
        if self.name:
            return entry_of(self.key_of_options, names)
        options = f"{self.relative_floor} {self.sketch} {self.seed} {self.dtype}"
        return content_entry(options, [self.slices[name] for name in names])

    def _read(self, key: str | None) -> NDArray[np.float64] | None:
        if key is None or self.cache is None:
            return None
        return read_tails(self.cache, key)

    def _write(self, key: str | None, tails: NDArray[np.float64]) -> None:
        if key is None or self.cache is None:
            return
        write_entry(self.cache, f"{key}.spectrum", tails.astype(np.float64).tobytes())
