"""Spectra of candidate groups: the loss of every rank at once.

Legend: I input features, O output features of a slice.

For slices ``W_i (O_i, I)`` with output statistics ``A_i`` and pooled input statistics ``G = S Sᵀ``
the least second-order loss increase at rank r is ``½ Σ_{k>r} σ_k²``, σ the singular values of the
stacked ``A_i^½ W_i S``. Their squares are the eigenvalues of ``Sᵀ (Σ W_iᵀ A_i W_i) S``: additive
over members, one eigenproblem of the smaller side per candidate, no tall SVD.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshare.base.cache import read_entry, write_entry
from fxshare.factors.factorise import Factors, Whitening, factorise, whiten
from fxshare.factors.metric import OutputRoot, SliceStatistics, output_root

# numbers in one kept decomposition, and how many are kept: at most 2 GB
_MOST_KEPT = 1 << 22
_MOST_DECOMPOSITIONS = 64
# numbers in all whitenings kept, two matrices each: 1 GB
_MOST_WHITENED = 1 << 26


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
    roots: dict[str, OutputRoot] = field(default_factory=dict)
    """Square roots of the output statistics by slice, made when first asked for."""
    _decompositions: dict[tuple[str, ...], Factors] = field(default_factory=dict)
    _tails: dict[frozenset[str], NDArray[np.float64]] = field(default_factory=dict)
    _whitenings: dict[tuple[object, ...], Whitening] = field(default_factory=dict)
    _products: dict[str, Tensor] = field(default_factory=dict)

    def whitening(self, names: tuple[str, ...]) -> Whitening:
        """The whitening of the members' pooled Gram: the mean over distinct inputs."""
        grams = {self.slices[n].input: self.slices[n].gram_II for n in names}
        key = tuple(sorted(map(id, grams.values())))
        if key not in self._whitenings:
            pooled = torch.stack([g.double() for g in grams.values()]).mean(0)
            if len(self._whitenings) * pooled.numel() > _MOST_WHITENED:
                self._whitenings.clear()
            self._whitenings[key] = whiten(pooled, relative_floor=self.relative_floor)
        return self._whitenings[key]

    def root(self, name: str) -> OutputRoot | None:
        """The root of a slice's output statistics; None where there are none."""
        moment = self.slices[name].moment_OO
        if moment is not None and name not in self.roots:
            self.roots[name] = output_root(moment, relative_floor=self.relative_floor)
        return self.roots.get(name)

    def factors(self, names: tuple[str, ...], rank: int) -> Factors:
        """The best factors of the stacked ``A_i^½ W_i`` at a rank.

        The decomposition of a group serves every rank, so that the plans of a search, which differ
        in ranks more than in groups, do not repeat it; those of wide groups are not kept.
        """
        whitening = self.whitening(tuple(sorted(names)))
        roots = [self.root(name) for name in names]
        members = [
            weight if root is None else root.apply(weight)
            for name, root in zip(names, roots, strict=True)
            for weight in (self.slices[name].weight_OI.double(),)
        ]
        features, out = members[0].shape[1], sum(len(member) for member in members)
        most = min(features - 1, out)  # full rank over the inputs has a form of its own
        if rank > most or features * (features + out) > _MOST_KEPT:
            return factorise(members, whitening, rank)
        if names not in self._decompositions:
            if len(self._decompositions) >= _MOST_DECOMPOSITIONS:
                self._decompositions.clear()
            self._decompositions[names] = factorise(members, whitening, most)
        whole = self._decompositions[names]
        return Factors(
            basis_RI=whole.basis_RI[:rank],
            coefficients=tuple(c[:, :rank] for c in whole.coefficients),
            spectrum=whole.spectrum,
            lost=float(whole.spectrum[rank:].sum()),
            total=whole.total,
        )

    def _product(self, name: str) -> Tensor:
        """``Wᵀ A W`` ``(I, I)``."""
        if name not in self._products:
            one = self.slices[name]
            weight = one.weight_OI.double()
            self._products[name] = weight.T @ one.times_moment(weight)
        return self._products[name]

    def tails(self, part: frozenset[str]) -> NDArray[np.float64]:
        """``½ Σ_{k>r} σ_k²`` for r = 0 .. min(I, O), descending to 0; computed once."""
        if part not in self._tails:
            self._tails[part] = self._compute_tails(part)
        return self._tails[part]

    def _compute_tails(self, part: frozenset[str]) -> NDArray[np.float64]:
        names = tuple(sorted(part))
        key = self._key(names)
        stored = self._read(key)
        if stored is not None:
            return stored
        self.computed += 1
        whitening = self.whitening(names)
        product = torch.stack([self._product(n) for n in names]).sum(0)
        if whitening.root_II is not None:
            product = whitening.root_II.T @ product @ whitening.root_II
        out = sum(len(self.slices[n].weight_OI) for n in names)
        full = min(product.shape[0], out)
        total = float(product.diagonal().sum())
        if self.sketch is not None and self.sketch < full // 2:
            leading = _leading(product, self.sketch, self.seed)
        else:
            leading = torch.linalg.eigvalsh(product).flip(0)[:full]
        values = leading.clamp(min=0).cpu().numpy()
        tail = np.zeros(full + 1)
        tail[: len(values) + 1] = total - np.concatenate([[0.0], np.cumsum(values)])
        # beyond the sketch the tail is not known: it stays at its last value, and is 0 at full rank
        tail[len(values) + 1 : full] = tail[len(values)]
        tail[full] = 0.0
        # what rounding leaves of the eigenvalues is no loss: a curve of it would make the planner
        # pay for ranks that the weights do not have
        tail[tail < full * np.finfo(np.float64).eps * total] = 0.0
        found: NDArray[np.float64] = 0.5 * np.minimum.accumulate(tail)
        self._write(key, found)
        return found

    def _key(self, names: tuple[str, ...]) -> str | None:
        if self.cache is None:
            return None
        digest = hashlib.sha256(f"{self.relative_floor} {self.sketch} {self.seed}".encode())
        inputs = [self.slices[name].input for name in names]
        for name in names:
            one = self.slices[name]
            # the Gram is pooled over distinct inputs: which members have the same one counts too
            shape, number = tuple(one.weight_OI.shape), inputs.index(one.input)
            digest.update(f"{shape} {number} {one.moment_OO is None}".encode())
            for t in (one.weight_OI, one.gram_II, one.moment_OO):
                if t is not None:
                    digest.update(t.detach().double().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _read(self, key: str | None) -> NDArray[np.float64] | None:
        if key is None or self.cache is None:
            return None
        content = read_entry(self.cache, f"{key}.spectrum")
        return None if content is None else np.frombuffer(content, np.float64).copy()

    def _write(self, key: str | None, tails: NDArray[np.float64]) -> None:
        if key is None or self.cache is None:
            return
        write_entry(self.cache, f"{key}.spectrum", tails.astype(np.float64).tobytes())


def _leading(matrix: Tensor, count: int, seed: int) -> Tensor:
    """The ``count`` leading Ritz values of a symmetric positive matrix, descending (Halko,
    Martinsson & Tropp 2011, subspace iteration)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(count + 16, matrix.shape[0])
    block = torch.randn(matrix.shape[0], width, generator=generator, dtype=torch.float64)
    block = block.to(matrix.device)
    for _ in range(4):
        block, _ = torch.linalg.qr(matrix @ block)
    values: Tensor = torch.linalg.eigvalsh(block.T @ matrix @ block)
    return values.flip(0)[:count]
