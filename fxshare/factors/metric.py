"""The metric in which a slice's error is measured: input moment and output moment."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fxshare.base.spent import part
from fxshare.calibration.gram import pooled_gram
from fxshare.calibration.statistics import Statistics
from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.factors.kept import Kept
from fxshare.sites.site import Site


def slice_statistics(
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    *,
    biases: Mapping[str, Tensor] | None = None,
    centred: bool = True,
    most_bytes: int = 1 << 28,
) -> dict[str, SliceStatistics]:
    """Statistics per slice. With ``centred`` a site that has a bias is judged by the covariance of
    its input: the mean's part of the error goes into the bias.

    Moments are expanded from what calibration keeps when they are asked for, and up to
    ``most_bytes`` of them are kept so. Raises :class:`CalibrationError` for a site that saw no
    tokens or a slice that got no gradient.
    """
    found: dict[str, SliceStatistics] = {}
    kept: Kept[Tensor] = Kept(most_bytes, stays=True, largest=most_bytes // 16)
    for site in sites:
        # what is looked up gets no bias that could take up a mean
        biased = centred and site.bias and not site.lookups
        statistics.check(site.name, [s.name for s in site.slices])
        mean = statistics.mean(site.name) if biased else None
        for s in site.slices:
            rows_OI = weights[site.name][s.start : s.stop]
            bias = (biases or {}).get(site.name)
            own = mean, None if bias is None else bias[s.start : s.stop]
            found[s.name] = _Measured(statistics, site.name, s.name, rows_OI, own, kept)
    return found


@dataclass(frozen=True, eq=False)
class SliceStatistics:
    """Everything about one slice that planning and factorising need, in float64.

    ``gram_II`` is shared by slices of the same input. ``moment_OO`` is ``A``, or ``(O,)`` its
    diagonal; None means the identity (activation error alone), unless ``Wᵀ A W`` was kept instead
    of it, which is ``product_II`` then, with the ``trace`` of ``A``. ``bias_O`` is its part of a
    bias, where it is given.
    """

    weight_OI: Tensor
    gram_II: Tensor
    moment_OO: Tensor | None
    input: Hashable
    mean_I: Tensor | None = None
    product_II: Tensor | None = None
    trace: float = 0.0
    bias_O: Tensor | None = None

    @property
    def is_projected(self) -> bool:
        """Whether ``Wᵀ A W`` was kept instead of ``A``."""
        return self.product_II is not None

    def unweighted(self) -> SliceStatistics:
        """The same slice by its activation error alone."""
        return replace(self, moment_OO=None, product_II=None, trace=0.0)

    def release(self) -> None:
        """Give back the memory of moments that can be expanded again, those of other slices of the
        same calibration too."""

    @cached_property
    def image_of_mean(self) -> Tensor:
        """``W E[x]`` ``(O,)``."""
        assert self.mean_I is not None
        image: Tensor = self.weight_OI.double() @ self.mean_I
        return image

    def times_gram(self, left_OI: Tensor) -> Tensor:
        """``left G`` ``(O, I)``, in the dtype of ``left``."""
        return left_OI @ self.gram_II.to(left_OI)

    def quadratic_loss(self, product_OI: Tensor) -> float:
        """``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)`` of another weight Ŵ; where ``A`` was not kept, of one that
        is ``W X`` for some X, as are all that have a basis of the inputs. Computed in the dtype of
        the product."""
        gap_OI = (self.weight_OI.double() - product_OI).to(product_OI.dtype)
        product_II = self.product_II
        if product_II is not None:
            through_II = _solved(self.weight_OI.double(), gap_OI.double())
            return 0.5 * float((product_II @ through_II @ self.gram_II * through_II).sum())
        moment = self.moment_OO
        left_OI = gap_OI if moment is None else _times(moment.to(gap_OI), gap_OI)
        return 0.5 * float((self.times_gram(left_OI) * gap_OI).sum(dtype=torch.float64))


class _Measured(SliceStatistics):
    """Of a calibration: moments are expanded when they are asked for, and kept among others."""

    def __init__(
        self,
        statistics: Statistics,
        site: str,
        name: str,
        weight_OI: Tensor,
        mean_and_bias: tuple[Tensor | None, Tensor | None],
        kept: Kept[Tensor],
        weighted: bool = True,
    ) -> None:
        set_ = object.__setattr__  # the fields of a frozen dataclass
        set_(self, "weight_OI", weight_OI)
        mean_I, bias_O = mean_and_bias
        set_(self, "mean_I", mean_I)
        set_(self, "bias_O", bias_O)
        set_(self, "input", (statistics.key([site]), mean_I is not None))
        set_(self, "_of", (statistics, site, name))
        set_(self, "_kept", kept)
        set_(self, "_weighted", weighted and bool(statistics.gradients))

    _of: tuple[Statistics, str, str]
    _kept: Kept[Tensor]
    _weighted: bool

    @property
    def _share(self) -> float:
        """How often a token reaches the site: losses are per token, so a linear called twice a
        token counts twice, an expert that sees a tenth of the tokens a tenth."""
        statistics, site, _ = self._of
        return statistics.tokens_of(site) / max(statistics.tokens, 1)

    @property
    def gram_II(self) -> Tensor:
        """``(I, I)``."""
        statistics, site, _ = self._of

        @part("moments")
        def make() -> Tensor:
            gram_II, mean_I = statistics.gram(site), self.mean_I
            return gram_II if mean_I is None else gram_II.addr_(mean_I, mean_I, alpha=-1)

        return self._kept.get(self.input, make, 8 * self.weight_OI.shape[1] ** 2)

    def times_gram(self, left_OI: Tensor) -> Tensor:
        """``left G``; of an input that is too wide for its moment to be kept that is not
        expanded."""
        statistics, site, _ = self._of
        if left_OI.dtype == torch.float64 or self._kept.has_room(8 * self.weight_OI.shape[1] ** 2):
            return super().times_gram(left_OI)
        return statistics.times_gram(left_OI, site, self.mean_I)

    @property
    def is_projected(self) -> bool:
        """Whether ``Wᵀ A W`` was kept instead of ``A``."""
        statistics, _, name = self._of
        return self._weighted and statistics.is_projected(name)

    @property
    def moment_OO(self) -> Tensor | None:
        """``A``."""
        return self._moment() if self._weighted and not self.is_projected else None

    @property
    def product_II(self) -> Tensor | None:
        """``Wᵀ A W``."""
        return self._moment() if self.is_projected else None

    @property
    def trace(self) -> float:
        """Of ``A``."""
        statistics, site, name = self._of
        return self._share * statistics.trace(name, site) if self._weighted else 0.0

    def _moment(self) -> Tensor:
        statistics, site, name = self._of
        share = self._share

        @part("moments")
        def make() -> Tensor:
            moment = statistics.moment(name, site)
            return moment if share == 1 else moment * share

        side = min(self.weight_OI.shape) if self.is_projected else len(self.weight_OI)
        return self._kept.get(("moment", name), make, 8 * side * side)

    def release(self) -> None:
        self._kept.clear()

    def unweighted(self) -> SliceStatistics:
        """The same slice by its activation error alone."""
        own = self.mean_I, self.bias_O
        return _Measured(*self._of, self.weight_OI, own, self._kept, weighted=False)


def _solved(weight_OI: Tensor, gap_OI: Tensor) -> Tensor:
    """The X ``(I, I)`` with ``W X`` closest to the gap."""
    root, failed = torch.linalg.cholesky_ex(weight_OI.T @ weight_OI)
    if not failed:
        solved: Tensor = torch.cholesky_solve(weight_OI.T @ gap_OI, root)
        return solved
    inverse_IO: Tensor = torch.linalg.pinv(weight_OI)
    return inverse_IO @ gap_OI


def _times(left: Tensor, right_OI: Tensor) -> Tensor:
    return left[:, None] * right_OI if left.ndim == 1 else left @ right_OI


def pooled_moment(slices: Mapping[str, SliceStatistics], names: Sequence[str]) -> Tensor:
    """The mean of the input moments of slices over their distinct inputs."""
    inputs = {slices[name].input: slices[name] for name in sorted(names)}
    if len(inputs) == 1:
        (alone,) = inputs.values()
        return alone.gram_II
    # one at a time: those of all layers of a wide input are gigabytes
    return pooled_gram(member.gram_II for member in inputs.values())


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
        """``Rᵀ weight`` ``(O, I)``, nothing raised; in the weight's dtype."""
        if self._is_triangular:
            return self._damping.root.T.to(weight_OI) @ weight_OI
        vectors, scale_O, _ = self._parts
        turned_OI = weight_OI if vectors is None else vectors.T.to(weight_OI) @ weight_OI
        return scale_O[:, None].to(weight_OI) * turned_OI

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
