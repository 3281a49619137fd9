"""Comparing outputs: how far apart, where, and how far apart rounding alone may bring them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ROUNDINGS = 16.0


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """Largest relative difference that rounding explains: ``16 · eps · sqrt(depth)``.

    ``depth`` is the number of matrix products one after the other. Roundings of independent
    products add up like a random walk, hence the root; 16 is the margin for the width of a product
    (its sum of ``n`` terms rounds like ``sqrt(n) · eps`` before the accumulation in blocks) and for
    the maximum over all elements. Relative means: over the largest magnitude of the tensor.
    """
    return _ROUNDINGS * torch.finfo(dtype).eps * math.sqrt(max(depth, 1))


@dataclass(frozen=True)
class Distance:
    """How far two outputs are apart: the worst element of the worst tensor.

    ``relative`` is ``|found − expected| / max|expected|`` over that tensor; ``where`` its path in
    the output and the index of the element.
    """

    relative: float
    absolute: float
    expected: float
    found: float
    where: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.relative:.2e} of the largest value, at {self.where}: expected "
            f"{self.expected:.6g}, found {self.found:.6g}"
        )


def beyond_rounding(distance: object, limit: float) -> str:
    """How far apart two things are, and how far rounding may bring them: for messages."""
    return f"{distance}; rounding explains {limit:.1e}"


def float_leaves(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of an output (tensor, tuple, mapping, ``ModelOutput``)."""
    plain = _plain(output)
    for path, leaf in pytree.tree_leaves_with_path(plain):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield f"output{pytree.keystr(path)}", leaf


def _plain(output: Any) -> Any:
    # transformers' ModelOutput: a mapping that pytree may not know
    if isinstance(output, dict):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_plain(value) for value in output]
    return output


def worst(expected: Any, found: Any) -> Distance:
    """The largest relative distance over all floating-point tensors of two outputs.

    A tensor that one output lacks, another shape, or NaN in one place only is infinitely far.
    """
    left, right = dict(float_leaves(expected)), dict(float_leaves(found))
    if set(left) != set(right):
        path = sorted(set(left) ^ set(right))[0]
        return Distance(math.inf, math.inf, math.nan, math.nan, path, ())
    result = Distance(0.0, 0.0, 0.0, 0.0, "output", ())
    for path, reference in left.items():
        distance = _distance(path, reference, right[path])
        if not distance.relative <= result.relative:
            result = distance
    return result


def _distance(path: str, expected: Tensor, found: Tensor) -> Distance:
    if expected.shape != found.shape:
        where = f"{path}: shape {tuple(found.shape)}"
        return Distance(math.inf, math.inf, math.nan, math.nan, where, tuple(expected.shape))
    if expected.numel() == 0:
        return Distance(0.0, 0.0, 0.0, 0.0, path, tuple(expected.shape))
    a, b = expected.detach().double(), found.detach().to(expected.device).double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs())
    gap = torch.where(gap.isnan(), math.inf, gap)
    at = int(gap.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), a.shape))
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    absolute = float(gap.flatten()[at])
    relative = absolute / scale if scale > 0 else (0.0 if absolute == 0 else math.inf)
    return Distance(
        relative,
        absolute,
        float(a.flatten()[at]),
        float(b.flatten()[at]),
        f"{path}[{', '.join(map(str, index))}]",
        tuple(expected.shape),
    )


def relative_error(weight_OI: Tensor, product_OI: Tensor) -> float:
    """``‖W − Ŵ‖_F / ‖W‖_F`` in float64; 0 for two zero matrices."""
    weight = weight_OI.detach().double()
    size = float(weight.norm())
    gap = float((weight - product_OI.to(weight.device)).norm())
    return gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))
