"""Which part of the values of an attention to keep, what every width loses, and what makes up for
the rest.

A head ``h`` of the values is ``z_h = W_V,h p (d,)``, of the attention's sum ``p`` of inputs; the
output reads it as ``W_O,h z_h``. Keeping ``r`` of the width is an orthonormal ``U_h (r, d)`` that
goes into both: the values become ``U_h W_V,h``, and the output reads ``U_h z_h``. As ``U_h`` stands
behind a sum over positions, it may as well stand before it, so nothing is left of it in the graph.

The best rank-r product ``W_O,h W_V,h`` under the moments of p and of the output's gradient (arXiv
2407.21118 and 2408.09632, which have no output metric) keeps the span of the values' inputs, so
that the moment ``G_h = E[z zᵀ]`` of what the output reads is all that is needed of p: with
``G_h = S Sᵀ`` and ``Q_h = W_O,hᵀ A W_O,h`` the rows of ``U_h`` span those of ``V_rᵀ S⁻¹``, V the
first eigenvectors of ``Sᵀ Q_h S``. Heads of one group share values: their ``G_h`` are averaged and
their ``Q_h`` summed. Then the output is fitted again to all heads at once, as hidden units are
(``units``): heads know something of one another, so what one loses others make up for.

Shape suffixes: n inputs of the output, d width of a head, K kept inputs, O output features, I
inputs of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxshare.base.numerics import relative_error
from fxshare.base.spent import part
from fxshare.errors import FactoriseError
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, UnitFactors, metric_of, mixing_of
from fxshare.plans.heads import Heads
from passes import DroppedHeads, KeptUnits, NarrowedHeads, NarrowedKeys


@dataclass(eq=False)
class HeadFactors(UnitFactors):
    """What carries an entry out: beside the consumer's weights ``(O, K)`` the turn of every
    key-value head, ``(kv heads, kept, d)``, which goes into the values."""

    turns: Tensor = field(default_factory=lambda: torch.zeros(0))

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A consumer's weight ``(O, n)`` for values as they were: the same function."""
        entry = self.entry
        assert isinstance(entry, Heads)
        weight_OK = self.weights[name]
        by_head = weight_OK.reshape(len(weight_OK), entry.heads, entry.kept).to(dtype)
        turns = self.turns.repeat_interleave(entry.heads // entry.kv_heads, 0).to(by_head)
        found: Tensor = torch.einsum("ohk,hkd->ohd", by_head, turns)
        return found.reshape(len(weight_OK), -1)

    def rows(self, first: int, rows: Tensor) -> Tensor:
        """The values' weight or bias of some key-value heads from one on, as they are after."""
        entry = self.entry
        own = rows.double().reshape(-1, entry.of, *rows.shape[1:])
        turns = self.turns[first : first + len(own)].to(own)
        found: Tensor = torch.einsum("hkd,hd...->hk...", turns, own)
        return found.reshape(-1, *rows.shape[1:])


@part("heads")
@torch.no_grad()
def turns_of(gram_nn: Tensor, metric_nn: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The turn of every key-value head, ``(kv heads, d, d)`` and orthogonal, what matters most
    first.

    Raises :class:`FactoriseError` for numbers that are not finite.
    """
    width, group = len(gram_nn) // heads, heads // kv_heads
    grams = own_blocks(gram_nn.double(), heads).reshape(kv_heads, group, width, width).mean(1)
    metrics = own_blocks(metric_nn.double(), heads).reshape(kv_heads, group, width, width).sum(1)
    if not bool((grams.sum() + metrics.sum()).isfinite()):
        raise FactoriseError("heads: expected finite moments, found NaN or infinity")
    values, vectors = torch.linalg.eigh((grams + grams.mT) / 2)
    floor = values.amax(-1, keepdim=True).clamp(min=1e-300) * 1e-12
    roots = values.clamp(min=floor).sqrt()
    # G = S Sᵀ with S = V diag(roots)
    inner = (vectors * roots[:, None]).mT @ metrics @ (vectors * roots[:, None])
    _, order = torch.linalg.eigh((inner + inner.mT) / 2)
    spans = (vectors / roots[:, None]) @ order.flip(-1)
    turns: Tensor = torch.linalg.qr(spans).Q.mT
    return turns.contiguous()


def own_blocks(moment_nn: Tensor, heads: int) -> Tensor:
    """The blocks ``(heads, d, d)`` on the diagonal."""
    width = len(moment_nn) // heads
    by_head = moment_nn.reshape(heads, width, heads, width)
    at = torch.arange(heads, device=moment_nn.device)
    return by_head[at, :, at]


@part("heads")
@torch.no_grad()
def widths_of(gram_nn: Tensor, metric_nn: Tensor, heads: int, kv_heads: int) -> Order:
    """What every width of the heads loses, 0 to all of it, in float64.

    The turned values are eliminated one after the other, the first of every head, the second of
    every head, and so on: of ``G = L Lᵀ`` in that order what is left of it after j of them is ``Σ
    l lᵀ`` over the columns behind, and that is lost in the metric.
    """
    width = len(gram_nn) // heads
    turns = turns_of(gram_nn, metric_nn, heads, kv_heads)
    turned = turned_moment(gram_nn.double(), turns, heads)
    metric = turned_moment(metric_nn.double(), turns, heads)
    order = torch.arange(heads * width, device=gram_nn.device).reshape(heads, width).T.flatten()
    turned = turned.index_select(0, order).index_select(1, order)
    metric = metric.index_select(0, order).index_select(1, order)
    root = _root(turned)
    gains = ((metric @ root) * root).sum(0).clamp(min=0.0).reshape(width, heads).sum(1)
    tails = gains.flip(0).cumsum(0).flip(0)
    return Order(torch.arange(width), 0.5 * torch.cat([tails, tails.new_zeros(1)]))


def turned_moment(moment_nn: Tensor, turns: Tensor, heads: int) -> Tensor:
    """A moment of the values in the turned ones' terms."""
    width = turns.shape[-1]
    turns = turns.repeat_interleave(heads // len(turns), 0)
    blocks = moment_nn.reshape(heads, width, heads, width)
    found: Tensor = torch.einsum("akd,adbe,ble->akbl", turns, blocks, turns)
    return found.reshape(heads * width, heads * width)


def _root(moment_nn: Tensor) -> Tensor:
    scale = float(moment_nn.diagonal().mean().clamp(min=1e-300))
    floor = 0.0
    while True:
        damped = moment_nn.clone()
        damped.diagonal().add_(floor * scale)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            found: Tensor = root
            return found
        if floor > 1.0:
            raise FactoriseError("heads: the moment of the values cannot be made regular")
        floor = max(floor * 100, 1e-14)


@part("heads")
@torch.no_grad()
def head_factors(
    entry: Heads,
    consumer: Mapping[str, SliceStatistics],
    lost: Order,
    *,
    bias: bool = True,
    relative_floor: float = 1e-8,
) -> HeadFactors:
    """What carries an entry out. ``consumer`` are the slices that read the heads. All of the width
    kept is the identity, whatever the moments are."""
    slices: Sequence[SliceStatistics] = list(consumer.values())
    first = slices[0]
    width, heads, kept = entry.of, entry.heads, entry.kept
    eye = torch.eye(width, dtype=torch.float64, device=first.gram_II.device)
    made = HeadFactors(
        entry,
        tuple(range(kept)),
        {name: one.weight_OI.double() for name, one in consumer.items()},
        lost=float(lost.lost[kept]),
        total=float(lost.lost[0]),
        turns=eye.repeat(entry.kv_heads, 1, 1),
    )
    if kept == width:
        return made
    turns = turns_of(first.gram_II, metric_of(slices), heads, entry.kv_heads)
    turned = turned_moment(first.gram_II.double(), turns, heads)
    there = torch.arange(heads * width).reshape(heads, width)[:, :kept].flatten()
    mixing_nK = mixing_of(turned, tuple(there.tolist()), relative_floor)
    every = turns.repeat_interleave(heads // entry.kv_heads, 0)
    made.turns = turns[:, :kept]
    for name, one in consumer.items():
        by_head = one.weight_OI.double().reshape(len(one.weight_OI), heads, width)
        turned_On = torch.einsum("ohd,hkd->ohk", by_head, every).reshape(len(by_head), -1)
        made.weights[name] = turned_On @ mixing_nK
        if bias and one.mean_I is not None:
            mean = torch.einsum("hkd,hd->hk", every[:, :kept], one.mean_I.reshape(heads, width))
            made.bias_shift[name] = one.image_of_mean - made.weights[name] @ mean.flatten()
    return made


@dataclass(frozen=True)
class Stored:
    """What the pass takes, and how far each slice and bias of it is from the dense one, with zeros
    where the width ends."""

    narrowed: NarrowedHeads | NarrowedKeys | DroppedHeads
    slice_errors: dict[str, float]
    bias_shifts: dict[str, float]


def stored_heads(
    made: HeadFactors, rows: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> Stored:
    """The tensors of an entry in the model's dtype. ``rows`` are the dense weights by slice, and
    ``biases`` those of the slices whose site has one."""
    entry = made.entry
    assert isinstance(entry, Heads)
    values, moved, first = {}, {}, 0
    for name in entry.values:
        dtype = rows[name].dtype
        values[name] = made.rows(first, rows[name]).to(dtype)
        if name in biases:
            moved[name] = made.rows(first, biases[name]).to(dtype)
        first += len(rows[name]) // entry.of
    consumers = {name: weight.to(rows[name].dtype) for name, weight in made.weights.items()}
    for name, shift in made.bias_shift.items():
        moved[name] = (biases[name].double() + shift).to(rows[name].dtype)
    errors, shifts = {}, {}
    for name, weight in {**values, **consumers}.items():
        is_value = name in values
        parts = (len(weight) if is_value else weight.shape[1]) // entry.kept
        kept = KeptUnits(entry.name, entry.of, made.kept, parts)
        whole = kept.whole(weight, 0 if is_value else 1)
        errors[name] = relative_error(rows[name], whole.double())
        if name in moved:
            bias = kept.whole(moved[name], 0) if is_value else moved[name]
            shifts[name] = float((bias.double() - biases[name].double()).norm())
    one = NarrowedHeads(entry.name, entry.kept, entry.of, values, consumers, moved)
    return Stored(one, errors, shifts)


__all__ = [
    "HeadFactors",
    "Stored",
    "head_factors",
    "own_blocks",
    "stored_heads",
    "turned_moment",
    "turns_of",
    "widths_of",
]
