"""Second moments of a linear site's input, gathered while the model runs.

The whitening of a basis (MATH: ``G = E[x xᵀ]``, one per site input) needs nothing else from the
calibration data. Its products cost more than half of the model's own matrix products, so they are
halved by symmetry: features are cut into strips, and each strip is multiplied only with the
features from its own first one onwards. torch exposes no BLAS ``syrk``.

Letters: I features in, T rows (tokens) of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fxshare.errors import CalibrationError

# Rows per product: bounds the copies made for masks and upcasts, and the length of a float32 sum.
_MAX_ROWS = 8192
# Rows of a vocabulary's width that are upcast at a time.
_MAX_DIAGONAL_ROWS = 512


TotalOf = Callable[[Tensor], Tensor]
"""What several processes have summed up, together; all call it at once."""


class Summed(Protocol):
    """Second moments, summed up: in memory, or in a file."""

    @property
    def kind(self) -> str:
        """``whole``, ``diagonal``, or ``projected`` (seen from the inputs)."""

    @property
    def features(self) -> int:
        """Of a row of what is kept."""

    @property
    def tokens(self) -> int:
        """Rows that were added."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""

    def gram(self) -> Tensor:
        """The moment, float64."""

    def trace(self) -> float:
        """Its trace."""


class SummedRows(Summed, Protocol):
    """Second moments with the sum of the rows."""

    def mean(self) -> Tensor:
        """The mean row, float64."""

    def times(self, left_OI: Tensor, mean_I: Tensor | None) -> Tensor:
        """``left (M − mean meanᵀ)`` of the moment ``M``, in the dtype of ``left``."""

    def check_finite(self) -> None:
        """Raises :class:`CalibrationError` where a sum is not finite."""


def _strips(features: int) -> list[tuple[int, int]]:
    """First and last+1 feature of every strip.

    Narrow strips save products above the diagonal, wide ones multiply faster. Measured on AVX-512
    with 2048 to 8192 rows, against one full product: 768 features 0.63 to 0.65 (128 wide), 0.70 to
    0.78 (256); 3072 features 0.58 to 0.61 (256), 0.59 to 0.66 (192), 0.61 to 0.65 (384).
    Square blocks instead of strips, and a transposed copy of the rows, were slower.
    """
    width = 128 if features <= 1024 else 256
    return [(first, min(first + width, features)) for first in range(0, features, width)]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the products of a model of this dtype are summed up in. The values of half precision
    have 8 or 11 bits: float32 sums of them, which are half as many bytes, lose nothing that an
    average over tokens knows."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


class GramAccumulator:
    """Sums ``x xᵀ`` and ``x`` over the rows it is given, in float64, or with ``dtype`` products in
    that (:func:`sums_dtype`).

    Products are float32 (float64 for float64 rows); half precision is upcast first, because a
    bfloat16 product would round its *output* to 8 bits. torch's float32 matmul precision setting
    applies. Order and batching of the rows change the result by rounding only.

    The sums live on ``device``, or where it is None on the device of the first rows; rows from
    elsewhere are moved there. No row and no autograd graph is kept.
    """

    kind = "whole"

    def __init__(
        self,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if features < 1:
            raise CalibrationError(f"a Gram matrix needs at least 1 feature, found {features}")
        self.features = features
        self.dtype = dtype
        self.tokens = 0
        self._device = None if device is None else torch.device(device)
        self._products: list[Tensor] = []  # upper strips: (width, features - first)
        self._sum: Tensor | None = None  # (features,) float64
        self._is_checked = False

    def state(self) -> dict[str, Tensor]:
        """The sums, to be written; nothing before the first rows."""
        if self._sum is None:
            return {}
        return {"sum": self._sum} | {str(at): part for at, part in enumerate(self._products)}

    @classmethod
    def restored(cls, features: int, tokens: int, state: Mapping[str, Tensor]) -> GramAccumulator:
        """What had this :meth:`state`."""
        made = cls(features)
        made.tokens = tokens
        made._is_checked = True  # or it would not have been written
        if state:
            made._sum = state["sum"]
            made._products = [state[str(at)] for at in range(len(_strips(features)))]
            made.dtype = made._products[0].dtype
        return made

    @staticmethod
    def bytes_needed(features: int, dtype: torch.dtype = torch.float64) -> int:
        """Bytes held by an accumulator of that many features: in float64 a little over
        ``4 features²``.

        :meth:`add` needs one float32 strip more while it runs, and copies of up to 8192 rows where
        they are masked or not float32.
        """
        strips = sum((end - first) * (features - first) for first, end in _strips(features))
        return dtype.itemsize * strips + 8 * features

    @property
    def nbytes(self) -> int:
        """Bytes held once the first rows were added (:meth:`bytes_needed`)."""
        return self.bytes_needed(self.features, self.dtype)

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Adds rows ``x: (..., features)`` of any floating dtype.

        ``keep`` is a bool mask of the leading dimensions; rows where it is False (padding) are
        left out entirely, whatever they contain. Raises CalibrationError where the shapes or
        dtypes do not fit.
        """
        if x.ndim == 0 or x.shape[-1] != self.features or not x.is_floating_point():
            raise CalibrationError(
                f"Gram matrix of {self.features} features: expected floating rows "
                f"(..., {self.features}), found {tuple(x.shape)} of {x.dtype}"
            )
        # Sums allocated in inference mode could not be updated outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            rows_TI = x.reshape(-1, self.features)
            if keep is None:
                for part_TI in torch.split(rows_TI, _MAX_ROWS):
                    self._add_rows(part_TI)
                return
            if keep.dtype != torch.bool or keep.numel() != len(rows_TI):
                raise CalibrationError(
                    f"Gram matrix of {self.features} features: expected a bool mask with one entry "
                    f"for each of the {len(rows_TI)} rows, found {tuple(keep.shape)} of "
                    f"{keep.dtype}; pass the attention mask as `mask.bool()`"
                )
            keep_T = keep.reshape(-1).to(rows_TI.device)
            for part_TI, part_T in zip(
                torch.split(rows_TI, _MAX_ROWS), torch.split(keep_T, _MAX_ROWS), strict=True
            ):
                self._add_rows(part_TI if bool(part_T.all()) else part_TI[part_T])

    def _add_rows(self, rows_TI: Tensor) -> None:
        if len(rows_TI) == 0:
            return
        total_I = self._allocate(rows_TI.device)
        self._is_checked = False
        dtype = torch.float64 if rows_TI.dtype == torch.float64 else torch.float32
        rows_TI = rows_TI.to(total_I.device, dtype)
        self.tokens += len(rows_TI)
        # A float64 sum of float32 rows would convert all of them first: it took a
        # tenth of the time of the product.
        total_I.add_(rows_TI.sum(0))
        strips = _strips(self.features)
        if dtype == self.dtype:
            for (first, end), products in zip(strips, self._products, strict=True):
                products.addmm_(rows_TI[:, first:end].T, rows_TI[:, first:])
            return
        scratch = torch.empty(self._products[0].numel(), dtype=dtype, device=rows_TI.device)
        for (first, end), products in zip(strips, self._products, strict=True):
            part = scratch[: products.numel()].view_as(products)
            torch.mm(rows_TI[:, first:end].T, rows_TI[:, first:], out=part)
            products.add_(part)

    def _allocate(self, device: torch.device) -> Tensor:
        if self._sum is None:
            where = self._device or device
            self._sum = torch.zeros(self.features, dtype=torch.float64, device=where)
            self._products = [
                torch.zeros(end - first, self.features - first, dtype=self.dtype, device=where)
                for first, end in _strips(self.features)
            ]
        return self._sum

    def merge(self, tokens: int, total_of: TotalOf, device: torch.device) -> None:
        """Take in what other processes have summed up of as many ``tokens`` in all; the sums are on
        ``device`` where this one had no rows."""
        if tokens:
            self._is_checked = False
            self._sum = total_of(self._allocate(device))
            self._products = [total_of(part) for part in self._products]
        self.tokens = tokens

    def check_finite(self) -> None:
        """Raises CalibrationError where no token was added or a sum is NaN or infinite."""
        self._checked_sum()

    def _checked_sum(self) -> Tensor:
        if self._sum is None:
            raise CalibrationError(
                f"Gram matrix of {self.features} features: expected at least 1 token, found 0; "
                "the site never ran, or the mask left out every row"
            )
        parts = () if self._is_checked else (self._sum, *self._products)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise CalibrationError(
                f"Gram matrix of {self.features} features: the sums over {self.tokens} tokens are "
                "not finite; mask padding rows with `keep`, or run the calibration in float32"
            )
        self._is_checked = True
        return self._sum

    def gram(self) -> Tensor:
        """The second moment ``E[x xᵀ]: (features, features)``, float64, exactly symmetric.

        Not centred. Raises CalibrationError like :meth:`check_finite`.
        """
        gram_II = self._checked_sum().new_empty(self.features, self.features)
        for (first, end), products in zip(_strips(self.features), self._products, strict=True):
            gram_II[first:end, first:] = products
            gram_II[first:, first:end] = products.T
            # Not every BLAS rounds both halves of a block on the diagonal alike.
            block = products[:, : end - first].double()
            gram_II[first:end, first:end] = (block + block.T) / 2
        return gram_II.div_(self.tokens)

    def times(self, left_OI: Tensor, mean_I: Tensor | None = None) -> Tensor:
        """``left (M − mean meanᵀ)`` ``(O, I)`` of the :meth:`gram` ``M``, without making it, in the
        dtype of ``left``: of a wide input that takes as long as half of the product. Raises
        CalibrationError like :meth:`check_finite`."""
        self._checked_sum()
        found_OI = torch.zeros_like(left_OI)
        for (first, end), products in zip(_strips(self.features), self._products, strict=True):
            strip = products.double() / self.tokens
            if mean_I is not None:  # before rounding: the mean may be most of the moment
                strip.addr_(mean_I[first:end], mean_I[first:], alpha=-1)
            strip = strip.to(left_OI)
            found_OI[:, first:].addmm_(left_OI[:, first:end], strip)
            found_OI[:, first:end].addmm_(left_OI[:, end:], strip[:, end - first :].T)
        return found_OI

    def trace(self) -> float:
        """The trace of :meth:`gram`, without making it. Raises CalibrationError where no token was
        added."""
        self._checked_sum()
        diagonals = (products.diagonal() for products in self._products)
        return float(torch.cat([one.double() for one in diagonals]).sum()) / self.tokens

    def mean(self) -> Tensor:
        """``E[x]: (features,)``, float64. Raises CalibrationError like :meth:`check_finite`."""
        return self._checked_sum() / self.tokens


class DiagonalAccumulator:
    """Sums ``x²`` over the rows it is given, in float64: the diagonal of a Gram matrix, for
    features as many as a vocabulary's, of which the whole would be gigabytes."""

    kind = "diagonal"

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0
        self._sum: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held once the first rows were added."""
        return 8 * self.features

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Adds rows ``x: (..., features)``; those where the bool mask ``keep`` is False are left
        out."""
        with torch.inference_mode(False), torch.no_grad():
            rows_TI = x.reshape(-1, self.features)
            if keep is not None:
                rows_TI = rows_TI[keep.reshape(-1).to(rows_TI.device)]
            if self._sum is None:
                self._sum = torch.zeros(self.features, dtype=torch.float64, device=x.device)
            self.tokens += len(rows_TI)
            for part_TI in torch.split(rows_TI, _MAX_DIAGONAL_ROWS):
                self._sum += part_TI.to(self._sum).square().sum(0)

    def merge(self, tokens: int, total_of: TotalOf, device: torch.device) -> None:
        """As :meth:`GramAccumulator.merge`."""
        if tokens:
            own = self._sum
            if own is None:
                own = torch.zeros(self.features, dtype=torch.float64, device=device)
            self._sum = total_of(own)
        self.tokens = tokens

    def gram(self) -> Tensor:
        """``E[x²]: (features,)``, float64."""
        if self._sum is None or not self.tokens:
            raise CalibrationError(f"{self.features} features: expected at least 1 row, found 0")
        return self._sum / self.tokens

    def state(self) -> dict[str, Tensor]:
        """The sums, to be written; nothing before the first rows."""
        return {} if self._sum is None else {"sum": self._sum}

    @classmethod
    def restored(
        cls, features: int, tokens: int, state: Mapping[str, Tensor]
    ) -> DiagonalAccumulator:
        """What had this :meth:`state`."""
        made = cls(features)
        made.tokens, made._sum = tokens, state.get("sum")
        return made

    def trace(self) -> float:
        """The sum of :meth:`gram`."""
        return float(self.gram().sum())


def pooled_gram(grams: Iterable[Tensor]) -> Tensor:
    """The mean of Gram matrices ``(features, features)``, each already divided by its tokens; one
    after the other is taken.

    A plain sum over layers would let those with more tokens, or with padding, dominate. Raises
    CalibrationError where there is none or the shapes differ.
    """
    pooled_II: Tensor | None = None
    count = 0
    for index, gram_II in enumerate(grams):
        count += 1
        if pooled_II is None:
            pooled_II = gram_II.to(torch.float64, copy=True)
            continue
        if gram_II.shape != pooled_II.shape:
            raise CalibrationError(
                f"Gram matrix {index} of the pool: expected {tuple(pooled_II.shape)} like the "
                f"first, found {tuple(gram_II.shape)}; only sites of one width share a basis"
            )
        pooled_II += gram_II.to(pooled_II)
    if pooled_II is None:
        raise CalibrationError("expected at least 1 Gram matrix to pool, found none")
    return pooled_II.div_(count)
