"""Next-token cross-entropy that holds one gradient of the logits, and no copy of them.

The logits of a large vocabulary are most of what a batch has alive when its backward pass begins.
``F.cross_entropy`` of all positions but the last copies them, keeps their log-softmax, and pads
its gradient: four more of their size. Here the rows are gone through a few at a time, twice.

Letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_IGNORED = -100
"""A target that does not count, as in ``F.cross_entropy``."""
_VIEWS = frozenset({"UnsafeViewBackward0", "ViewBackward0", "ReshapeAliasBackward0"})
_PRODUCTS = frozenset({"MmBackward0", "AddmmBackward0", "LinearBackward0"})
# numbers that are in float32 at a time
_MOST = 1 << 20


def next_token_losses(
    logits_BTV: Tensor, targets_BT: Tensor, *, last_reader: bool = False
) -> Tensor:
    """The cross-entropy ``(B, T - 1)`` of all positions but the last with what follows them,
    ``targets (B, T - 1)``; of half precision in float32.

    As ``last_reader`` of the logits their gradient takes their place in the backward pass, where
    nothing that computed them reads them again.
    """
    takes = last_reader and _is_product(logits_BTV)
    found: Tensor = _CrossEntropy.apply(logits_BTV, targets_BT, takes)  # type: ignore[no-untyped-call]
    return found


def _is_product(values: Tensor) -> bool:
    """Whether autograd says that they are a matrix product, for whose gradient its result is not
    needed, as that of ``tanh`` is."""
    made = values.grad_fn
    while made is not None and made.name() in _VIEWS:
        made = made.next_functions[0][0]
    return made is not None and made.name() in _PRODUCTS


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, targets_BT: Tensor, takes: bool) -> Tensor:
        ctx.takes = takes
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        sums_BT = torch.zeros(targets_BT.shape, dtype=wide, device=logits_BTV.device)
        for at in _rows(logits_BTV):
            sums_BT[at] = torch.logsumexp(logits_BTV[at].to(wide), -1)
        counts_BT = targets_BT != _IGNORED
        chosen_BT1 = targets_BT.where(counts_BT, 0)[..., None]
        ctx.save_for_backward(logits_BTV, chosen_BT1, counts_BT, sums_BT)
        picked_BT = logits_BTV[:, :-1].gather(2, chosen_BT1).squeeze(2).to(wide)
        return (sums_BT - picked_BT) * counts_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_BTV, chosen_BT1, counts_BT, sums_BT = ctx.saved_tensors
        scale_BT1 = (gradients[0] * counts_BT)[..., None]
        found_BTV = logits_BTV.detach() if ctx.takes else torch.empty_like(logits_BTV)
        found_BTV[:, -1] = 0
        for at in _rows(logits_BTV):
            probabilities = (logits_BTV[at].to(sums_BT.dtype) - sums_BT[at][..., None]).exp_()
            probabilities.mul_(scale_BT1[at])
            probabilities.scatter_add_(-1, chosen_BT1[at], -scale_BT1[at])
            found_BTV[at] = probabilities
        return found_BTV, None, None


def _rows(logits_BTV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some samples and some of their positions, the last one apart."""
    samples, length, vocabulary = logits_BTV.shape
    whole = max(_MOST // max(length * vocabulary, 1), 1)
    part = max(_MOST // max(vocabulary, 1), 1)
    for sample in range(0, samples, whole):
        for first in range(0, length - 1, part):
            yield slice(sample, sample + whole), slice(first, min(first + part, length - 1))


__all__ = ["next_token_losses"]
