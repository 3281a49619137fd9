"""Which heads of an attention to keep, what every number of them loses, and what makes up for the
others.

A head goes with its key, its value and its columns of the output ``W (O, n)``; of heads that share
a key and a value all go together. That is hidden units (``units``) a block at a time: with the
moment G of what the output reads and ``Q = Wᵀ A W``, the heads J that stay lose

    ½ tr(Q (G − G_:J G_JJ⁻¹ G_J:)),     W' = W G_:J G_JJ⁻¹

for the best W'. J is chosen greedily, each time the block whose elimination from G gains most.

Shape suffixes: n inputs of the output, J those of heads that stay, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxshare.base.numerics import relative_error
from fxshare.base.spent import part
from fxshare.errors import FactoriseError
from fxshare.factors.blocks import blocks_by_gain
from fxshare.factors.heads import Stored
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, UnitFactors, mixing_of
from fxshare.plans.whole_heads import WholeHeads
from passes import DroppedHeads, KeptUnits


@dataclass(eq=False)
class WholeHeadFactors(UnitFactors):
    """What carries an entry out: the heads of keys that stay, and the consumer's weights
    ``(O, columns of those)``."""

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A consumer's weight ``(O, n)`` with zeros where heads go: the same function."""
        weight = self.weights[name].to(dtype)
        each = weight.shape[1] // self.entry.kept
        return KeptUnits(self.entry.name, self.entry.of, self.kept, each=each).whole(weight, 1)


@part("heads")
@torch.no_grad()
def whole_heads_order(gram_nn: Tensor, metric_nn: Tensor, groups: int) -> Order:
    """The key-value heads by what they are worth, and what every number of them loses, in float64.

    Raises :class:`FactoriseError` for numbers that are not finite.
    """
    gram_nn, each = gram_nn.double(), len(gram_nn) // groups
    if not bool((gram_nn.sum() + metric_nn.sum()).isfinite()):
        raise FactoriseError("heads: expected finite moments, found NaN or infinity")
    blocks = [range(at * each, (at + 1) * each) for at in range(groups)]
    order, gains = blocks_by_gain(gram_nn, metric_nn.to(gram_nn), blocks)
    gained = torch.tensor(gains, dtype=torch.float64)
    total = (gram_nn * metric_nn.to(gram_nn)).sum().cpu()
    # what the last one gains is what was left before it
    lost = torch.cat([total[None], total - gained.cumsum(0)]).clamp(min=0.0)
    lost[-1] = 0.0
    return Order(torch.tensor(order), 0.5 * lost.cummin(0).values)


@part("heads")
@torch.no_grad()
def whole_head_factors(
    entry: WholeHeads,
    consumer: Mapping[str, SliceStatistics],
    order: Order,
    *,
    bias: bool = True,
    relative_floor: float = 1e-8,
) -> WholeHeadFactors:
    """What carries an entry out. ``consumer`` are the slices that read the heads. All heads kept
    are the identity, whatever the moments are."""
    slices: Sequence[SliceStatistics] = list(consumer.values())
    made = WholeHeadFactors(
        entry,
        order.kept(entry.kept),
        {name: one.weight_OI.double() for name, one in consumer.items()},
        lost=float(order.lost[entry.kept]),
        total=float(order.lost[0]),
    )
    if entry.kept == entry.of:
        return made
    gram_nn = slices[0].gram_II
    each = len(gram_nn) // entry.of
    there = KeptUnits(entry.name, entry.of, made.kept, each=each).places()
    mixing_nJ = mixing_of(gram_nn, tuple(there.tolist()), relative_floor)
    for name, one in consumer.items():
        made.weights[name] = one.weight_OI.double() @ mixing_nJ
        if bias and one.mean_I is not None:
            mean_J = one.mean_I[there.to(one.mean_I.device)]
            made.bias_shift[name] = one.image_of_mean - made.weights[name] @ mean_J
    return made


def stored_whole_heads(
    made: WholeHeadFactors, rows: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> Stored:
    """The tensors of an entry in the model's dtype. ``rows`` are the dense weights by slice, and
    ``biases`` those of the slices whose site has one."""
    entry = made.entry
    assert isinstance(entry, WholeHeads)
    units = entry.units_of({name: len(rows[name]) for name in entry.own}, made.kept)
    weights, moved = {}, {}
    for name, own in units.items():
        there = own.places().to(rows[name].device)
        weights[name] = rows[name].index_select(0, there)
        if name in biases:
            moved[name] = biases[name].index_select(0, there).to(rows[name].dtype)
    consumers = {name: weight.to(rows[name].dtype) for name, weight in made.weights.items()}
    for name, shift in made.bias_shift.items():
        moved[name] = (biases[name].double() + shift).to(rows[name].dtype)
    errors, shifts = {}, {}
    for name, weight in weights.items():
        errors[name] = relative_error(rows[name], units[name].whole(weight, 0).double())
        if name in moved:
            whole = units[name].whole(moved[name], 0).double()
            shifts[name] = float((whole - biases[name].double()).norm())
    for name, weight in consumers.items():
        whole = replace(made, weights=consumers).whole(name, weight.dtype)
        errors[name] = relative_error(rows[name], whole.double())
        if name in moved:
            shifts[name] = float((moved[name].double() - biases[name].double()).norm())
    queries, keys, values = (
        {name: weights[name] for name in names}
        for names in (entry.queries, entry.keys, entry.values)
    )
    one = DroppedHeads(entry.name, made.kept, entry.of, queries, keys, values, consumers, moved)
    return Stored(one, errors, shifts)


__all__ = ["WholeHeadFactors", "stored_whole_heads", "whole_head_factors", "whole_heads_order"]
