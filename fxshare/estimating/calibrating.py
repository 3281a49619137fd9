"""What gathering statistics takes: forward, backward, and the sums.

Legend: T rows (tokens) of a batch, I input features of a site, O outputs of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxshare.calibration.blocks import moment_bytes
from fxshare.calibration.gradients import is_diagonal, is_projected
from fxshare.calibration.gram import GramAccumulator, sums_dtype
from fxshare.cost_model.pace import NOTHING, Amount, Pace
from fxshare.cost_model.work import Attention, Matmul, Operation
from fxshare.estimating.counted import Counted
from fxshare.sites.site import Site

_BACKWARD_TRAFFIC = 2.0
"""Of elementwise work: what it reads is what both directions wrote."""
_BACKWARD_ATTENTION = 2.5
_LOSS_PASSES = 8
"""How often logits are read or written by a next-token loss in float32 and its gradient."""
_FORWARD_LOSS_PASSES = 4
_CALLS = 12
"""Operations of a sum over a batch that do next to nothing."""


def forward(pace: Pace, counted: Counted, itemsize: int) -> Amount:
    """A batch through the model."""
    return _sum(_operation(pace, one, itemsize) for one in counted.step)


def loss(pace: Pace, counted: Counted, *, backward: bool) -> Amount:
    """The next-token loss of a batch, in float32, perhaps with its gradient."""
    passes = _LOSS_PASSES if backward else _FORWARD_LOSS_PASSES
    return pace.moved(4 * counted.rows * counted.logits * passes, 1 << 30)


def backward(pace: Pace, counted: Counted, itemsize: int) -> Amount:
    """Its gradients at activations: every product again, by the weight as it is."""
    found = NOTHING
    for one in counted.step:
        work = _operation(pace, one, itemsize)
        times = _BACKWARD_TRAFFIC
        if isinstance(one, Matmul):
            times = 1.0
        elif isinstance(one, Attention):
            times = _BACKWARD_ATTENTION
        found += work * times
    return found


def sums(pace: Pace, counted: Counted, sites: Sequence[Site], *, gradients: bool) -> Amount:
    """The second moments of a batch: of every distinct input, and with ``gradients`` at every
    output."""
    found, seen = NOTHING, set()
    for site in sites:
        rows = counted.rows_of.get(site.name, counted.rows)
        read = counted.reads[site.name]
        if site.calls and read not in seen:
            seen.add(read)
            found += gram(pace, rows, site.in_features)
        if not gradients or not site.calls:
            continue
        # a copy for the tap, and whether it is finite
        found += pace.moved(4 * 4 * rows * site.out_features)
        for s in site.slices:
            if is_diagonal(site, s):
                found += pace.moved(4 * 6 * rows * s.out_features)
            elif is_projected(site, s):
                found += pace.product(rows, s.out_features, site.in_features, "single")
                # the sum of squares is taken in float64
                found += pace.moved(3 * 12 * rows * s.out_features)
                found += gram(pace, rows, site.in_features)
            else:
                found += pace.moved(2 * 4 * rows * s.out_features) + gram(
                    pace, rows, s.out_features
                )
    return found


def gram(pace: Pace, rows: float, features: int) -> Amount:
    """One sum over rows: a product of about half of the columns, added in float64."""
    width = 128 if features <= 1024 else 256
    half = (features + min(width, features)) / 2
    strips = -(-features // width)
    product = pace.product(rows, half, features, "single")
    product = Amount(rows * half * features * 2 / (product.flops / product.seconds), product.flops)
    added = pace.moved(20 * features * half, 20 * min(width, features) * half)
    return product + added + pace.calls(_CALLS + 3 * strips)


@dataclass(frozen=True)
class Bytes:
    """Of statistics: all of one round, and the largest part that cannot be made smaller."""

    all: int
    block: int


def statistics_bytes(
    counted: Counted, sites: Sequence[Site], model: torch.dtype, *, gradients: bool
) -> Bytes:
    """What :func:`fxshare.calibration.blocks.bytes_needed` says of a capture, by what was counted,
    of a model in a dtype.

    Sites that read one input are in one block.
    """
    blocks: dict[object, int] = {}
    dtype = sums_dtype(model)
    for site in sites:
        read = counted.reads[site.name] if site.calls else "lookups"
        if read not in blocks:
            blocks[read] = 0
            if site.calls:
                blocks[read] = GramAccumulator.bytes_needed(site.in_features, dtype)
        looked_up = len(site.lookups)
        blocks[read] += 8 * site.out_features * looked_up
        if gradients:
            blocks[read] += GramAccumulator.bytes_needed(site.in_features) * looked_up
            if site.calls:
                blocks[read] += sum(moment_bytes(site, s, dtype) for s in site.slices)
    return Bytes(sum(blocks.values()), max(blocks.values(), default=0))


def _operation(pace: Pace, one: Operation, itemsize: int) -> Amount:
    if isinstance(one, Matmul):
        product = pace.product(one.rows, one.inner, one.out, "model") * one.batch
        moved = pace.moved(one.numbers * itemsize, 1 << 30)
        return Amount(max(product.seconds, moved.seconds), product.flops)
    moved = pace.moved(one.numbers * itemsize) + pace.calls(1)
    if isinstance(one, Attention):
        product = pace.product(one.rows, one.width, one.keys, "model")
        per_flop = product.seconds / max(product.flops, 1)
        return Amount(moved.seconds + per_flop * one.flops, one.flops)
    return moved


def _sum(amounts: Iterator[Amount]) -> Amount:
    found = NOTHING
    for one in amounts:
        found += one
    return found


__all__ = ["Bytes", "backward", "forward", "gram", "loss", "statistics_bytes", "sums"]
