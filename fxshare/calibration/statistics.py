"""What calibration gathered: the numbers that planning and factorising need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fxshare.calibration.gram import Summed, SummedRows
from fxshare.calibration.lookups import LookedUpSite, Metric, gram_without_gradients, metric
from fxshare.errors import CalibrationError


@dataclass(frozen=True)
class Statistics:
    """What calibration gathered.

    ``inputs`` maps a site's name to the accumulators of its inputs (several when the module is
    called more than once); sites that read the same activation share the same accumulator.
    """

    inputs: Mapping[str, tuple[SummedRows, ...]]
    batches: int
    tokens: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    gradients: Mapping[str, tuple[Summed, ...]] = field(default_factory=dict)
    """Per slice the second moments of its output's gradient, one for each call of its module."""
    lookups: Mapping[str, LookedUpSite] = field(default_factory=dict)
    """Of the sites whose rows are looked up."""
    loss: str = ""
    """The loss whose gradients they are."""
    mean_loss: float = math.nan
    """That loss per token on the calibration data."""
    starts_with: int | None = None
    """The token that every sample of ids started with; None where they differ, or for no ids."""
    folder: object = None
    """What has the files that sums are in, for as long as they are needed."""

    def moment(self, slice_name: str, site: str) -> Tensor:
        """``A = E[δ δᵀ]`` ``(out, out)`` float64, δ the summed loss' gradient at one token; its
        diagonal ``(out,)`` where no more was kept (:func:`is_diagonal`), and ``Wᵀ A W``
        ``(in, in)`` where that was kept instead (:meth:`is_projected`)."""
        if site in self.lookups:
            return self._metric(site).rows_V
        return self._moment(slice_name, self.tokens_of(site))

    def is_projected(self, slice_name: str) -> bool:
        """Whether :meth:`moment` of a slice is ``Wᵀ A W``."""
        parts = self.gradients.get(slice_name, ())
        return any(part.kind == "projected" for part in parts)

    def trace(self, slice_name: str, site: str) -> float:
        """The trace of ``A``, whichever form of it was kept."""
        if site in self.lookups:
            return float(self._metric(site).rows_V.sum())
        return self._trace(slice_name, self.tokens_of(site))

    def check(self, site: str, slices: Sequence[str]) -> None:
        """Raise :class:`CalibrationError` where a site saw no tokens, or a slice of it, in case
        there are gradients, got none."""
        if site in self.lookups:
            self.gram(site)
            return
        self._seen(site)
        for name in slices if self.gradients else ():
            self._trace(name, self.tokens_of(site))

    def _moment(self, slice_name: str, tokens: int) -> Tensor:
        self._trace(slice_name, tokens)
        seen = [part for part in self.gradients[slice_name] if part.tokens]
        moments = [part.gram() * (part.tokens / tokens) for part in seen]
        return moments[0] if len(moments) == 1 else torch.stack(moments).sum(0)

    def _trace(self, slice_name: str, tokens: int) -> float:
        seen = [part for part in self.gradients[slice_name] if part.tokens]
        if not seen or tokens == 0:
            raise CalibrationError(
                f"slice {slice_name!r} gets no gradient: the loss does not depend on it for this "
                "data, or the model computes it under no_grad; leave it out of the patterns or "
                "give another loss"
            )
        total = sum(part.trace() * (part.tokens / tokens) for part in seen)
        if total <= 0:
            raise CalibrationError(
                f"slice {slice_name!r} gets no gradient: it is zero at every token of the "
                "calibration data; leave it out of the patterns or give another loss"
            )
        return total

    def mean(self, site: str) -> Tensor:
        """``E[x]`` ``(in,)`` float64 over all inputs of the site."""
        parts, total = self._seen(site)
        return torch.stack([part.mean() * (part.tokens / total) for part in parts]).sum(0)

    def gram(self, site: str) -> Tensor:
        """``E[x xᵀ]`` ``(in, in)`` float64 over all inputs of the site, weighted by tokens; the
        caller's own."""
        if site in self.lookups:
            if self.gradients:
                return self._metric(site).columns_II
            called = any(part.tokens for part in self.inputs[site])
            gram_II = self._gram(site) if called else None
            return gram_without_gradients(gram_II, self.lookups[site].width)
        return self._gram(site)

    def times_gram(self, left_OI: Tensor, site: str, mean_I: Tensor | None = None) -> Tensor:
        """``left (G − mean meanᵀ)`` ``(O, I)`` of the :meth:`gram` of a site, in the dtype of
        ``left``."""
        if site in self.lookups:
            gram_II = self.gram(site)
            if mean_I is not None:
                gram_II.addr_(mean_I, mean_I, alpha=-1)
            return left_OI @ gram_II.to(left_OI)
        parts, total = self._seen(site)
        if len(parts) == 1:
            return parts[0].times(left_OI, mean_I)
        found = [part.times(left_OI, None) * (part.tokens / total) for part in parts]
        if mean_I is not None:
            mean_I = mean_I.to(left_OI)
            found.append(torch.outer(left_OI @ mean_I, -mean_I))
        return torch.stack(found).sum(0)

    def _gram(self, site: str) -> Tensor:
        parts, total = self._seen(site)
        if len(parts) == 1:  # of a wide input every copy is as much work as reading it
            return parts[0].gram()
        return torch.stack([part.gram() * (part.tokens / total) for part in parts]).sum(0)

    def _seen(self, site: str) -> tuple[list[SummedRows], int]:
        """What the site read wherever it was called, and how many tokens in all."""
        parts = [part for part in self.inputs[site] if part.tokens]
        total = sum(part.tokens for part in parts)
        if total == 0:
            raise CalibrationError(
                f"{site!r} saw no tokens: it never ran on the calibration data, or every token was "
                "masked; give data that reaches it, or leave it out of the patterns"
            )
        return parts, total

    def _metric(self, site: str) -> Metric:
        """Of a site whose rows are looked up, and perhaps multiplied by."""
        looked_up = self.lookups[site]
        multiplied = None
        rows = sum(part.tokens for part in self.inputs[site])
        if rows:
            scale = rows / max(self.tokens, 1)
            moment_O = self._moment(looked_up.slice_name, rows)
            multiplied = Metric(moment_O * scale, self._gram(site))
        elif not any(part.tokens for part in looked_up.parts):
            raise CalibrationError(
                f"{site!r} saw no tokens: no row of it was looked up on the calibration data; give "
                "data that reaches it, or leave it out of the patterns"
            )
        return metric(looked_up.parts, self.tokens, multiplied)

    def tokens_of(self, site: str) -> int:
        """Rows that went into the site's Gram; of one that is looked up all tokens, because its
        metric counts how many of them reach it."""
        if site in self.lookups:
            return self.tokens
        return sum(part.tokens for part in self.inputs[site])

    def key(self, sites: Sequence[str]) -> tuple[str, ...]:
        """Equal for sets of sites that have the same statistics."""
        looked_up = tuple(f"rows of {site}" for site in sites if site in self.lookups)
        parts = (part for site in sites for part in self.inputs[site])
        return looked_up + tuple(self._names[id(part)] for part in parts)

    @cached_property
    def _names(self) -> dict[int, str]:
        """Of every input's statistics the name of who reads it first."""
        found: dict[int, str] = {}
        for site, parts in self.inputs.items():
            for at, part in enumerate(parts):
                found.setdefault(id(part), f"input {at} of {site}")
        return found
