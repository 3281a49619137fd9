"""Which hidden units of an MLP to keep, what every number of them loses, and what makes up for the
others.

Units J are kept in producers and consumer ``W (O, n)``, whose new weight minimises the loss of the
change, ``½ tr(A (W P − W' P_J) ...)``: with ``G = E[h hᵀ]`` of the units' values it is
``W' = W G_:J G_JJ⁻¹`` (Nyström, arXiv 2406.15786 and 2408.09632), whatever A is. What is lost is

    ½ tr(Q (G − G_:J G_JJ⁻¹ G_J:)),     Q = Wᵀ A W

J is chosen greedily, by pivoted elimination on G: the next unit is that whose elimination takes
most off the trace. Its gain is ``(R Q R)_jj / R_jj`` with R what is left of G, so R and ``M = R Q
R`` are carried along. Both are updated a block of units at a time: within a block columns alone are
computed, and units that are eliminated leave both. ``O(n³)`` in all, in matrix products.

Shape suffixes: n units, K kept ones, O output features, t units of the present block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fxshare.base.cache import read_entry, write_entry
from fxshare.base.quantised import Quantised
from fxshare.base.spent import part
from fxshare.errors import FactoriseError
from fxshare.factors.entries import entry_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.plans.units import Units

_BLOCK = 64
_TINY = 1e-13
# what a unit is told by may be so many times as large as units are, before it cancels
_MOST_CANCELS = 100.0
"""Of the largest diagonal entry: what is left of a unit that others tell is rounding."""


@dataclass(frozen=True, eq=False)
class Order:
    """Units by what they are worth, the first one first.

    ``lost`` ``(n + 1,)`` is the predicted loss ``½ tr(Q R_k)`` with the first k; it ends in 0.
    """

    units: Tensor
    lost: Tensor

    def kept(self, count: int) -> tuple[int, ...]:
        """The first ``count`` units, ascending."""
        found: list[int] = self.units[:count].sort().values.tolist()
        return tuple(found)


@dataclass(eq=False)
class UnitFactors:
    """What carries out an entry of a plan: the units that stay, and for each slice of the consumer
    its weight ``(O, K)`` and where a bias takes up a mean the shift of it, in float64."""

    entry: Units
    kept: tuple[int, ...]
    weights: dict[str, Tensor]
    bias_shift: dict[str, Tensor] = field(default_factory=dict)
    lost: float = 0.0
    total: float = 0.0
    quantised: dict[str, Quantised] = field(default_factory=dict)
    """What is stored where the entry has few bits, by slice: the consumer's weights, and the rows
    of the producers that stay."""

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A consumer's weight ``(O, n)`` with zeros where units go: the same function as the dense
        producers and the shifted bias have, whatever an activation makes of zero."""
        weight_OK = self.weights[name].to(dtype)
        whole_On = weight_OK.new_zeros(len(weight_OK), self.entry.of)
        return whole_On.index_copy(1, torch.tensor(self.kept, device=whole_On.device), weight_OK)


@torch.no_grad()
def metric_of(consumer: Sequence[SliceStatistics]) -> Tensor:
    """``Q = Σ Wᵀ A W`` ``(n, n)`` of the slices of a consumer."""
    found: Tensor | None = None
    for one in consumer:
        product = one.product_II
        if product is None:
            weight_On, moment = one.weight_OI.double(), one.moment_OO
            if moment is None:
                left = weight_On
            elif moment.ndim == 1:
                left = moment[:, None] * weight_On
            else:
                left = moment @ weight_On
            product = weight_On.T @ left
        found = product.clone() if found is None else found + product
    assert found is not None, "a consumer has slices"
    return (found + found.T) / 2


@part("units")
@torch.no_grad()
def order_of(gram_nn: Tensor, metric_nn: Tensor) -> Order:
    """The order of units and the loss of every number of them, in float64 on the Gram's device.

    Raises :class:`FactoriseError` for numbers that are not finite.
    """
    units = len(gram_nn)
    left_nn = gram_nn.double().clone()
    metric_nn = metric_nn.to(left_nn)
    moved_nn = left_nn @ metric_nn @ left_nn
    if not bool(moved_nn.sum().isfinite()):
        raise FactoriseError("hidden units: expected finite moments, found NaN or infinity")
    there = torch.arange(units, device=left_nn.device)
    least = _TINY * float(left_nn.diagonal().max().clamp(min=0.0))
    order: list[Tensor] = []
    gains: list[Tensor] = []
    while len(there):
        taken, gained, columns, images = _block(left_nn, moved_nn, least)
        order.append(there[taken])
        gains.append(gained)
        keep = torch.ones(len(there), dtype=torch.bool, device=there.device)
        keep[taken] = False
        there = there[keep]
        if len(there):
            left_nn, moved_nn = _eliminated(left_nn, moved_nn, columns, images, keep)
    gained = torch.cat(gains).clamp(min=0.0)
    tails = gained.flip(0).cumsum(0).flip(0)
    return Order(torch.cat(order), 0.5 * torch.cat([tails, tails.new_zeros(1)]))


def _block(
    left_nn: Tensor, moved_nn: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next units by position, what each gains, their columns ``V (n, t)`` of the elimination
    ``R − V Vᵀ``, and ``R Q V``, with R as it was before the block."""
    units = len(left_nn)
    size = min(_BLOCK, units)
    columns = left_nn.new_zeros(units, size)
    images = left_nn.new_zeros(units, size)
    between = left_nn.new_zeros(size, size)  # Vᵀ Q V
    diagonal, score = left_nn.diagonal().clone(), moved_nn.diagonal().clone()
    taken = torch.zeros(size, dtype=torch.int64, device=left_nn.device)
    gained = left_nn.new_zeros(size)
    for at in range(size):
        # what others tell already, and what was taken, comes last
        gain = torch.where(diagonal > least, score / diagonal.clamp(min=1e-300), -1.0)
        gain[taken[:at]] = -2.0
        best = gain.argmax()
        taken[at] = best
        known, image = columns[:, :at], images[:, :at]
        along = known[best]
        root = diagonal[best].clamp(min=0.0).sqrt()
        told = bool(diagonal[best] > least)
        scale = 1 / root if told else torch.zeros_like(root)
        column = (left_nn[:, best] - known @ along) * scale
        # R Q v, and Vᵀ Q v, without another product with Q
        moved = (moved_nn[:, best] - image @ along) * scale
        cross = (image[best] - between[:at, :at] @ along) * scale
        own = (moved_nn[best, best] - 2 * image[best] @ along) * scale**2
        own = own + along @ between[:at, :at] @ along * scale**2
        columns[:, at], images[:, at] = column, moved
        between[:at, at] = between[at, :at] = cross
        between[at, at] = own
        gained[at] = own
        # of what is left after the columns before: (R − V Vᵀ) Q v
        reached = moved - known @ cross
        diagonal = (diagonal - column**2).clamp(min=0.0)
        score = score - 2 * column * reached + column**2 * own
    return taken, gained, columns, images - 0.5 * columns @ between


def _eliminated(
    left_nn: Tensor, moved_nn: Tensor, columns: Tensor, images: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """R and ``R Q R`` of the units that are left, after a block of others."""
    at = keep.nonzero().flatten()
    columns, images = columns[at], images[at]
    left_nn = left_nn.index_select(0, at).index_select(1, at)
    moved_nn = moved_nn.index_select(0, at).index_select(1, at)
    left_nn.addmm_(columns, columns.T, alpha=-1)
    moved_nn.addmm_(images, columns.T, alpha=-1)
    moved_nn.addmm_(columns, images.T, alpha=-1)
    return left_nn, moved_nn


def read_order(spectra: Spectra, kind: str, names: tuple[str, ...]) -> Order | None:
    """The order that was kept with some spectra for the units that these slices read; None where
    it was not."""
    if spectra.cache is None or not spectra.name:
        return None
    found = stored_order(spectra.cache, spectra.key_of_options, kind, names)
    device = next(iter(spectra.slices.values())).weight_OI.device
    return found and Order(found.units.to(device), found.lost.to(device))


def stored_order(folder: Path, options: str, kind: str, names: tuple[str, ...]) -> Order | None:
    """:func:`read_order` from a folder, without the spectra."""
    content = read_entry(folder, _entry(options, kind, names))
    if content is None:
        return None
    numbers = torch.frombuffer(bytearray(content), dtype=torch.float64)
    units = len(numbers) // 2
    return Order(numbers[:units].long(), numbers[units:])


def write_order(spectra: Spectra, kind: str, names: tuple[str, ...], order: Order) -> None:
    """Keep an order with the spectra, where they are kept by names."""
    if spectra.cache is not None and spectra.name:
        numbers = torch.cat([order.units.double(), order.lost]).cpu().numpy()
        key = _entry(spectra.key_of_options, kind, names)
        write_entry(spectra.cache, key, numbers.tobytes())


def _entry(options: str, kind: str, names: tuple[str, ...]) -> str:
    return f"{entry_of(options, (f'kind {kind}', *names))}.order"


@part("units")
@torch.no_grad()
def unit_factors(
    entry: Units,
    consumer: dict[str, SliceStatistics],
    order: Order,
    *,
    bias: bool = True,
    relative_floor: float = 1e-8,
) -> UnitFactors:
    """What carries an entry out. ``consumer`` are the slices that read the units. All units kept
    are the identity, whatever the moments are."""
    kept = order.kept(entry.kept)
    total, lost = float(order.lost[0]), float(order.lost[entry.kept])
    made = UnitFactors(entry, kept, {}, lost=lost, total=total)
    if entry.kept == entry.of:
        made.weights = {name: one.weight_OI.double() for name, one in consumer.items()}
        return made
    first = next(iter(consumer.values()))
    mixing_nK = mixing_of(first.gram_II, kept, relative_floor, most=_MOST_CANCELS)
    for name, one in consumer.items():
        made.weights[name] = one.weight_OI.double() @ mixing_nK
        if bias and one.mean_I is not None:
            at = torch.tensor(kept, device=one.mean_I.device)
            made.bias_shift[name] = one.image_of_mean - made.weights[name] @ one.mean_I[at]
    return made


def mixing_of(
    gram_nn: Tensor, kept: tuple[int, ...], relative_floor: float, *, most: float = math.inf
) -> Tensor:
    """``G_:J G_JJ⁻¹`` ``(n, K)``: what each unit is, told by those that stay.

    The Gram is damped until it is regular, and no part of what a unit is told by is more than
    ``most`` times as large as units are: of fewer tokens than units what is left is rounding, and
    divided by it weights would be millions of times too large, and cancel.

    Raises :class:`FactoriseError` for moments that are not finite.
    """
    at = torch.tensor(kept, device=gram_nn.device)
    columns_nK = gram_nn.index_select(1, at)
    block_KK = columns_nK.index_select(0, at)
    scale = float(block_KK.diagonal().mean().clamp(min=1e-300))
    size_K = (block_KK.diagonal() / scale).clamp(min=0.0).sqrt()
    floor = 1e-14
    while True:
        damped = block_KK.clone()
        damped.diagonal().add_(floor * scale)
        root_KK, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            mixing: Tensor = torch.cholesky_solve(columns_nK.T, root_KK).T
            if most == math.inf or float((mixing.abs().amax(0) * size_K).max()) <= most:
                break
        if floor > 1.0:
            raise FactoriseError(
                f"hidden units: the moment of the {len(kept)} units that stay cannot be made "
                "regular; look for NaN or infinity in the calibration data"
            )
        # a singular Gram: fewer tokens than units
        floor = max(floor * 100, relative_floor)
    # a unit that stays tells itself
    mixing[at] = torch.eye(len(kept), dtype=mixing.dtype, device=mixing.device)
    return mixing


__all__ = [
    "Order",
    "UnitFactors",
    "metric_of",
    "mixing_of",
    "order_of",
    "read_order",
    "stored_order",
    "unit_factors",
    "write_order",
]
