"""The first-order part of what a plan loses, on as few tokens as it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fxshare.base.filed import Filed
from fxshare.base.lazily import Lazily
from fxshare.base.spent import part
from fxshare.planning.judge import Judge

_STEP = 0.25
_ERROR = 0.1
_FEWEST = 4
"""Batches, after which it can be told that no number of them will do."""


@dataclass(frozen=True)
class Slope:
    """A mean gradient along a change of the weights, per token, and its error over the batches that
    it was measured on: the standard error, by Student's t for as few (infinite of one batch)."""

    value: float
    error: float
    tokens: int


@part("slope", whole=True)
def slope(
    judge: Judge,
    tokens: Sequence[float],
    old: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    new: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    *,
    predicted: float,
    what: object = None,
) -> Slope:
    """The first-order part of a plan's loss increase: the mean gradient along its change of the
    weights and biases, as a central difference at ``± step`` of that change.

    The planner's quadratic model has no such part, since it vanishes where training has converged
    on the calibration data. Where the plan changes little, the slope is most of what it loses.

    ``tokens`` are those of each of the judge's calls. Four calls are taken, and then as many again
    as there were, until the error is a tenth of ``|slope| + |predicted|``, all that is said of the
    loss, or there are no more; no more are taken where all would leave twice that error. ``what``
    tells the change apart.
    """
    new = _filed(new[0]), new[1]  # weights that take a while to make, asked for four times and more
    found: list[float] = []
    while True:
        which = range(len(found), min(max(2 * len(found), _FEWEST), len(tokens)))
        # of a difference of two losses the dense model's is no part
        up, down = (
            judge.losses(judge.substituted(*_moved(old, new, by), what and (what, by)), which)
            for by in (_STEP, -_STEP)
        )
        found += [(a - b) / (2 * _STEP) for a, b in zip(up, down, strict=True)]
        measured = estimate(found, tokens[: len(found)])
        wanted = _ERROR * (abs(measured.value) + abs(predicted))
        hopeless = len(found) >= _FEWEST and _least(measured, found, tokens) > 2 * wanted
        if measured.error <= wanted or hopeless or len(found) == len(tokens):
            return measured


def _filed(made: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same matrices, made once, those that are no finer than float32 in a temporary file."""
    file = Filed()
    rows: dict[str, Callable[[], Tensor]] = {}

    def read(name: str) -> Tensor:
        if name in rows:
            return rows[name]()
        matrix = made[name]
        plain = matrix.dtype.itemsize <= 4 and matrix.ndim == 2
        kept = file.keep(matrix) if plain else None
        if kept is not None:
            rows[name] = partial(kept, len(matrix))
        return matrix

    return Lazily(tuple(made), read)


def _moved(
    old: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    new: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    share: float,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights and biases moved by a share of their change; each is made when it is asked for."""
    weights, biases = (_between(*both, share) for both in zip(old, new, strict=True))
    return weights, biases


def _between(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float
) -> Mapping[str, Tensor]:
    def made(name: str) -> Tensor:
        moved = new[name]
        found: Tensor = moved.lerp(old[name].to(moved), 1 - share)
        return found

    return Lazily(tuple(new), made)


def estimate(found: Sequence[float], tokens: Sequence[float]) -> Slope:
    """The ratio of two sums over batches, and its standard error."""
    total, count = sum(tokens), len(found)
    value = sum(found) / max(total, 1e-300)
    error = math.inf
    if count > 1:
        apart = sum((one - value * size) ** 2 for one, size in zip(found, tokens, strict=True))
        error = math.sqrt(apart * count / (count - 1)) / max(total, 1e-300)
        error *= _of_few(count)
    return Slope(value, error, round(total))


def _least(measured: Slope, found: Sequence[float], tokens: Sequence[float]) -> float:
    """What the error would come down to over all batches there are."""
    share = len(found) / len(tokens)
    return measured.error * math.sqrt(share) * _of_few(len(tokens)) / _of_few(len(found))


def _of_few(count: int) -> float:
    """Two thirds of all means are within a standard error; of few, t says within how many."""
    return 1 + 0.84 / (count - 1)
