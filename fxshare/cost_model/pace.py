"""What a device does per second of the work that compiling is: products of either precision,
eigenproblems, triangular roots, traffic, and calls that do next to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fxshare.cost_model.rates import Points

Origin = Literal["measured", "published", "assumed"]
Precision = Literal["model", "single", "double"]


@dataclass(frozen=True)
class Amount:
    """Some work: how long it takes, and its arithmetic."""

    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, times: float) -> Amount:
        return Amount(self.seconds * times, self.flops * times)

    __rmul__ = __mul__


NOTHING = Amount()


@dataclass(frozen=True)
class Pace:
    """Constants of one device at one number of threads.

    ``model``, ``single`` and ``double`` are FLOP/s of products in the model's dtype, in float32 and
    in float64, by their narrowest dimension. ``eigh``, ``eigvalsh`` and ``cholesky`` are cubes of
    the size a second, by size, in float64. ``traffic`` are bytes a second by the bytes that an
    operation reads and writes. ``call`` are the seconds of an operation that has nothing to do.
    """

    device: str
    name: str
    dtype: str
    threads: int
    origin: Origin
    model: Points
    single: Points
    double: Points
    eigh: Points
    eigvalsh: Points
    cholesky: Points
    traffic: Points
    call: float

    def product(self, rows: float, inner: float, out: float, kind: Precision = "double") -> Amount:
        """``(rows, inner) @ (inner, out)``."""
        points = {"model": self.model, "single": self.single, "double": self.double}[kind]
        flops = 2 * rows * inner * out
        return Amount(flops / _at(points, min(rows, inner, out)) + self.call, flops)

    def triangle(self, size: float, inner: float, kind: Precision = "double") -> Amount:
        """A symmetric product ``(size, inner) @ (inner, size)``, of which about half is done."""
        return self.product(size, inner, size, kind) * 0.6

    def eigenvectors(self, size: float) -> Amount:
        """All eigenvalues and vectors of a symmetric matrix."""
        return Amount(size**3 / _at(self.eigh, size) + self.call, 9 * size**3)

    def eigenvalues(self, size: float) -> Amount:
        """All eigenvalues of a symmetric matrix."""
        return Amount(size**3 / _at(self.eigvalsh, size) + self.call, 4 / 3 * size**3)

    def root(self, size: float) -> Amount:
        """A triangular root of a positive matrix."""
        return Amount(size**3 / _at(self.cholesky, size) + self.call, size**3 / 3)

    def moved(self, size: float, whole: float | None = None) -> Amount:
        """``size`` bytes read and written, ``whole`` of them at a time."""
        return Amount(size / _at(self.traffic, size if whole is None else whole))

    def calls(self, count: float) -> Amount:
        """Operations that have nothing to do."""
        return Amount(count * self.call)


def _at(points: Points, at: float) -> float:
    """Linear in the logarithms of both axes, constant beyond the points."""
    x, y = (np.log([point[axis] for point in points]) for axis in (0, 1))
    return float(np.exp(np.interp(np.log(max(at, 1.0)), x, y)))


__all__ = ["NOTHING", "Amount", "Origin", "Pace", "Precision"]
