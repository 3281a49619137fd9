"""Seconds of single products and attentions, measured on one device at the shapes of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
ProductKey: TypeAlias = tuple[int, int, int]
"""Rows, inner width and outputs: ``(T, I) @ (I, O)``."""
AttentionKey: TypeAlias = tuple[int, int, int, int, int]
"""Heads times batch, rows, keys, width of a head, and 1 where it is causal."""
# what two products have in common that lie on one line of ranks: bases of one input, coefficients
# of one output, and tables of pivoted bases, whose width and rank add up to the input's
_LINES: tuple[tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]], ...] = (
    (lambda inner, out: inner, lambda inner, out: out),
    (lambda inner, out: out, lambda inner, out: inner),
    (lambda inner, out: inner + out, lambda inner, out: out),
)


@dataclass(frozen=True)
class Measured:
    """Seconds without a launch, by shape: ``products`` and ``attentions``, in ascending order."""

    products: tuple[tuple[ProductKey, float], ...] = ()
    attentions: tuple[tuple[AttentionKey, float], ...] = ()

    def product_seconds(self, rows: int, inner: ArrayLike, out: ArrayLike) -> Floats:
        """Of products of these sizes, elementwise: linear between two that were measured of the
        same number of rows and, the nearest two first, of the same inner width, of as many outputs,
        or of the same sum of both. NaN where nothing was measured on either side."""
        inner, out = np.broadcast_arrays(np.asarray(inner, float), np.asarray(out, float))
        found, reach = np.full(inner.shape, np.nan), np.full(inner.shape, np.inf)
        known = np.array([key for key, _ in self.products if key[0] == rows], float).reshape(-1, 3)
        if not len(known):
            return found
        took = np.array([seconds for key, seconds in self.products if key[0] == rows])
        for fixed, along in _LINES:
            lines, places = fixed(known[:, 1], known[:, 2]), along(known[:, 1], known[:, 2])
            wanted, at = fixed(inner, out), along(inner, out)
            for line in np.intersect1d(lines, wanted):
                on = lines == line
                order = np.argsort(places[on])
                x, y = places[on][order], took[on][order]
                above = np.clip(np.searchsorted(x, at), 0, len(x) - 1)
                below = np.clip(np.searchsorted(x, at, side="right") - 1, 0, None)
                apart = x[above] - x[below]
                use = (wanted == line) & (x[0] <= at) & (at <= x[-1]) & (apart < reach)
                found = np.where(use, np.interp(at, x, y), found)
                reach = np.where(use, apart, reach)
        return found

    def part_seconds(self, rows: int, inner: float, out: float) -> float:
        """Of ``out`` rows of a larger weight: their part of the tallest that was measured of this
        inner width; NaN where none is as tall."""
        tallest = max((k for k, _ in self.products if k[:2] == (rows, inner)), default=(0, 0, 0))
        taken = dict(self.products).get(tallest, np.nan)
        return taken * out / tallest[2] if 0 < out <= tallest[2] else np.nan

    def attention_seconds(self, key: AttentionKey) -> float | None:
        """Of one that was measured; None of others."""
        return dict(self.attentions).get(key)

    def with_others(self, others: Measured) -> Measured:
        """These, and of ``others`` what is not among them."""
        return Measured(
            tuple(sorted((dict(others.products) | dict(self.products)).items())),
            tuple(sorted((dict(others.attentions) | dict(self.attentions)).items())),
        )


def parsed(products: Sequence[Any], attentions: Sequence[Any]) -> Measured:
    """From the lists of a file; ``ValueError`` says what they should have been."""
    return Measured(
        tuple((_key(key, 3), _seconds(took)) for key, took in products),
        tuple((_key(key, 5), _seconds(took)) for key, took in attentions),
    )


def _key(key: Sequence[Any], length: int) -> Any:
    found = tuple(int(size) for size in key)
    if len(found) != length or min(found[:length]) < (0 if length == 5 else 1):
        raise ValueError(f"measured shapes: expected {length} positive sizes, found {key!r}")
    return found


def _seconds(took: Any) -> float:
    if not 0 < float(took) < float("inf"):
        raise ValueError(f"measured shapes: expected positive finite seconds, found {took!r}")
    return float(took)


__all__ = ["AttentionKey", "Measured", "ProductKey", "parsed"]
