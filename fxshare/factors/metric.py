"""The metric in which a slice's error is measured: input moment and output moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxshare.calibration.statistics import Statistics
from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.sites.site import Site


def slice_statistics(
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    *,
    centred: bool = True,
) -> dict[str, SliceStatistics]:
    """Statistics per slice. With ``centred`` a site that has a bias is judged by the covariance of
    its input: the mean's part of the error goes into the bias."""
    found = {}
    grams: dict[object, Tensor] = {}
    for site in sites:
        # what is looked up gets no bias that could take up a mean
        biased = centred and site.bias and not site.lookups
        key = (statistics.key([site.name]), biased)
        mean = statistics.mean(site.name) if biased else None
        if key not in grams:
            gram = statistics.gram(site.name)
            grams[key] = gram if mean is None else gram - torch.outer(mean, mean)
        # losses are per token: a linear called twice a token counts twice, an expert that sees a
        # tenth of the tokens a tenth
        rows = statistics.tokens_of(site.name) / max(statistics.tokens, 1)
        for s in site.slices:
            moment = statistics.moment(s.name, site.name) if statistics.gradients else None
            found[s.name] = SliceStatistics(
                weight_OI=weights[site.name][s.start : s.stop],
                gram_II=grams[key],
                moment_OO=None if moment is None else moment if rows == 1 else moment * rows,
                input=key,
                mean_I=mean,
            )
    return found


@dataclass(frozen=True, eq=False)
class SliceStatistics:
    """Everything about one slice that planning and factorising need, in float64.

    ``gram_II`` is shared by slices of the same input. ``moment_OO`` is ``A``, or ``(O,)`` its
    diagonal; None means the identity (activation error alone).
    """

    weight_OI: Tensor
    gram_II: Tensor
    moment_OO: Tensor | None
    input: object
    mean_I: Tensor | None = None

    @cached_property
    def image_of_mean(self) -> Tensor:
        """``W E[x]`` ``(O,)``."""
        assert self.mean_I is not None
        image: Tensor = self.weight_OI.double() @ self.mean_I
        return image

    def times_moment(self, gap_OI: Tensor) -> Tensor:
        """``A gap`` ``(O, I)``."""
        return gap_OI if self.moment_OO is None else _times(self.moment_OO.double(), gap_OI)


def _times(left: Tensor, right_OI: Tensor) -> Tensor:
    return left[:, None] * right_OI if left.ndim == 1 else left @ right_OI


class OutputRoot:
    """A root ``R Rᵀ = A`` of an output moment: Cholesky's, or of a singular one by its eigenvalues,
    which count as they are in errors and raised to the floor in factors; a diagonal ``A``'s own."""

    def __init__(self, damping: Damping) -> None:
        self._damping = damping

    @cached_property
    def _parts(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """``Q``, and two roots of eigenvalues ``(O,)``: as they are, and raised to the floor."""
        moment, vectors = self._damping.moment, None
        values = moment
        if moment.ndim == 2:
            values, vectors = torch.linalg.eigh(moment)
        return vectors, values.clamp(min=0).sqrt(), values.clamp(min=self._damping.floor).sqrt()

    @property
    def _is_triangular(self) -> bool:
        return self._damping.moment.ndim == 2 and not self._damping.singular

    @property
    def floored(self) -> int:
        """How many eigenvalues are below the floor."""
        return self._damping.floored

    def apply(self, weight_OI: Tensor) -> Tensor:
        """``Rᵀ weight`` ``(O, I)``, nothing raised."""
        if self._is_triangular:
            return self._damping.root.T @ weight_OI
        vectors, scale_O, _ = self._parts
        return scale_O[:, None] * (weight_OI if vectors is None else vectors.T @ weight_OI)

    def times(self, left_OR: Tensor) -> Tensor:
        """``R left`` ``(O, R)``."""
        if self._is_triangular:
            return self._damping.root @ left_OR
        vectors, _, raised_O = self._parts
        scaled = raised_O[:, None] * left_OR
        return scaled if vectors is None else vectors @ scaled

    def undo(self, left_OR: Tensor) -> Tensor:
        """``R⁻ᵀ left`` ``(O, R)``."""
        if self._is_triangular:
            root = self._damping.root.T
            solved: Tensor = torch.linalg.solve_triangular(root, left_OR, upper=True)
            return solved
        vectors, _, raised_O = self._parts
        scaled = left_OR / raised_O[:, None]
        return scaled if vectors is None else vectors @ scaled


def output_root(moment_OO: Tensor, *, relative_floor: float = 1e-8) -> OutputRoot:
    """The root of a damped ``A``, which is singular where a unit is dead."""
    moment = moment_OO.double()
    if not bool(moment.isfinite().all()):
        raise FactoriseError("gradient statistics: expected finite entries, found NaN or infinity")
    damping = Damping(moment if moment.ndim == 1 else (moment + moment.T) / 2, relative_floor)
    if damping.largest <= 0:
        raise FactoriseError("gradient statistics are all zero: the loss does not depend on it")
    return OutputRoot(damping)
