"""What few bits lose, for every candidate, width and rank.

Truncation and rounding add up, since what is truncated stands upright on what is kept. Rounding is
measured with nearest codes at a few ranks, and between them read off a line of its logarithm; how
far error feedback brings it down is measured at one of them. That is a model: the plans of the
search are judged with the codes that they would have.

Beside spectra that are kept by names these losses are kept too, so that another budget in bytes is
planned without the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxshare.base.cache import read_entry, write_entry
from fxshare.base.spent import part as spent
from fxshare.errors import FactoriseError, PlanError
from fxshare.factors.elimination import Elimination
from fxshare.factors.entries import entry_of
from fxshare.factors.pivots import complement, pivot
from fxshare.factors.rounding import better_codes, lost_by, lost_of_gap, nearest, with_feedback
from fxshare.factors.spectra import Spectra
from fxshare.planning.solver.curve import Floats
from fxshare.planning.solver.problem import Node, Part
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.storage import Ints, Storage

_SHARES = (0.1, 0.4, 0.8)
"""Of the ranks that are offered, those at which rounding is measured."""


@dataclass(eq=False)
class RoundingPrice:
    """Losses of rounding on the statistics of some spectra, computed when first asked for."""

    spectra: Spectra | StoredSpectra
    nodes: Mapping[str, Node]
    """The slices."""
    _dense: dict[tuple[str, int], float] = field(default_factory=dict)
    _rounded: dict[tuple[str, int], float] = field(default_factory=dict)
    _factors: dict[tuple[Part, str, int], Floats] = field(default_factory=dict)

    def dense(self, part: Part, bits: int) -> float:
        """What dense slices lose together."""
        return sum(self._slice(name, bits) for name in part)

    def factors(self, part: Part, storage: Storage, bits: int, ranks: Ints) -> Floats:
        """What the factors of a group lose beside truncation, at ranks (ascending)."""
        if not len(ranks):
            return np.zeros(0)
        if len(part) > 1:  # about as much as those of single slices, which take no decomposition
            alone = [self.factors(frozenset({name}), storage, bits, ranks) for name in part]
            return np.asarray(sum(alone))
        key = part, storage.name, bits
        if key not in self._factors:
            node = self.nodes[next(iter(part))]
            full = min(node.in_features, node.out_features)
            there = ranks[ranks <= full] if (ranks <= full).any() else np.array([full])
            at = np.unique([there[int(share * (len(there) - 1))] for share in _SHARES])

            def lost() -> Floats:
                return self._line(part, storage, bits, at)

            kept = self._kept(f"{storage.name} {bits} {at.tolist()}", part, lost)
            self._factors[key] = np.stack([at.astype(np.float64), np.log(kept.clip(min=1e-300))])
        at, logarithms = self._factors[key]
        found: Floats = np.exp(np.interp(ranks, at, logarithms))
        return found

    @spent("price rounding")
    def _slice(self, name: str, bits: int) -> float:
        """What a dense slice loses."""
        key = name, bits

        def lost() -> Floats:
            if key not in self._rounded:
                self._round_together(name, bits)
            return np.array([self._rounded[key]])

        if key not in self._dense:
            kept = self._kept(f"dense {bits}", frozenset({name}), lost)
            self._dense[key] = max(float(kept[0]), 0.0)
        return self._dense[key]

    def _round_together(self, name: str, bits: int) -> None:
        """What a dense slice and the others that read its input lose. Rows are rounded each for
        itself, so that one pass over the columns does for all: of heads it takes a quarter."""
        slices, work = self._live.slices, self._live.dtype
        first = slices[name]
        together = {
            other: slices[other]
            for other in dict.fromkeys((name, *self.nodes))
            if slices[other].input == first.input
            and slices[other].weight_OI.dtype == first.weight_OI.dtype
        }
        weight_OI = torch.cat([one.weight_OI.to(work) for one in together.values()])
        gram_II, dtype = first.gram_II, first.weight_OI.dtype
        elimination = self._live.pooled((name,)).elimination
        codes = (
            nearest(weight_OI, bits, dtype, gram_II.diagonal()),
            with_feedback(weight_OI, gram_II, bits, dtype, elimination),
        )
        heights = [len(one.weight_OI) for one in together.values()]
        each = zip(*(torch.split(one.values(work), heights) for one in codes), strict=True)
        for (other, one), values in zip(together.items(), each, strict=True):
            self._rounded[other, bits] = min(lost_by(one, value) for value in values)

    def _kept(self, what: str, part: Part, measure: Callable[[], Floats]) -> Floats:
        """What was measured on these statistics before, or is now."""
        spectra = self.spectra
        if isinstance(spectra, StoredSpectra):
            folder, options = spectra.folder, spectra.options
        elif spectra.cache is None or not spectra.name:
            return measure()
        else:
            folder, options = spectra.cache, spectra.key_of_options
        entry = f"{entry_of(options, (f'rounding {what}', *part))}.rounding"
        content = read_entry(folder, entry)
        if content is not None:
            kept: Floats = np.frombuffer(content, np.float64).copy()
            return kept
        found = measure()
        write_entry(folder, entry, found.tobytes())
        return found

    @spent("price rounding")
    def _line(self, part: Part, storage: Storage, bits: int, at: Ints) -> Floats:
        """What rounding adds at some ranks, brought down as far as feedback does at one."""
        lost = np.array([self._measured(part, storage, bits, int(rank)) for rank in at])
        middle = len(at) // 2
        fed = self._measured(part, storage, bits, int(at[middle]), feedback=True)
        lost *= min(fed / lost[middle], 1.0) if lost[middle] > 0 else 1.0
        return lost

    def _measured(
        self, part: Part, storage: Storage, bits: int, rank: int, *, feedback: bool = False
    ) -> float:
        """What rounding adds at a rank, to nearest codes or with feedback."""
        spectra, names = self._live, tuple(sorted(part))
        work = spectra.dtype
        try:
            made = spectra.factors(names, rank, work)
            pivoted = pivot(made.basis_RI) if storage.keeps_inputs else None
        except FactoriseError:  # a rank that the weights do not have
            return 0.0
        pooled, elimination = spectra.pooled(names), None
        moment = pooled.moment
        stored = spectra.slices[names[0]].weight_OI.dtype
        if pivoted is None:
            whole, kept, table = made.basis_RI, None, made.basis_RI
            scales = made.coefficients
            elimination = pooled.elimination if feedback else None
        else:
            kept, table = pivoted.kept_J, pivoted.table_RT.to(work)
            rest = complement(kept, moment.shape[0])
            whole = storage.whole_basis(table, kept)
            scales = tuple(c @ pivoted.block_RR.to(work) for c in made.coefficients)
            moment = moment[rest][:, rest]

        def codes(matrix: Tensor, under: Tensor, known: Elimination | None = None) -> Tensor:
            if feedback:
                return better_codes(matrix, under, bits, stored, known).values(work)
            return nearest(matrix, bits, stored, under.diagonal()).values(work)

        coded = codes(table, moment, elimination)
        coarse = storage.whole_basis(coded, kept)
        inner: Tensor = whole.double() @ pooled.moment @ whole.double().T
        lost = 0.0
        for name, coefficient in zip(names, scales, strict=True):
            gap = coefficient @ whole - codes(coefficient, inner) @ coarse
            lost += lost_of_gap(spectra.slices[name], gap)
        return max(lost, 0.0)

    @property
    def _live(self) -> Spectra:
        if isinstance(self.spectra, StoredSpectra):
            raise PlanError(
                f"planner.bits: what rounding loses was not measured in "
                f"{self.spectra.folder.parent}; give MODEL and --calibration as well (the same as "
                "then), or plan with the bits of that run (--bits 16 where it had none)"
            )
        return self.spectra


__all__ = ["RoundingPrice"]
