"""The divergence of one distribution over a vocabulary from another, a few rows at a time.

Of a vocabulary of 50,000 the logits are most of what a step holds. Left to autograd there are five
tensors of their size; here there are the student's logits, their gradient and the teacher's
distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NUMBERS = 1 << 20
"""Of the rows that are gone through at a time."""


def distribution(rows_NV: Tensor, temperature: float) -> Tensor:
    """The logarithms of the probabilities ``(N, V)`` at a temperature, at least in float32."""
    wide = rows_NV if rows_NV.dtype == torch.float64 else rows_NV.float()
    return (wide if temperature == 1.0 else wide / temperature).log_softmax(-1)


def divergence_of(logits_NV: Tensor, wanted_NV: Tensor, temperature: float) -> Tensor:
    """``Σ p (log p − log q)`` over rows, where ``log p`` is ``wanted_NV`` and q the distribution of
    the logits at the temperature. Its gradient can be taken once."""
    found: Tensor = _Divergence.apply(logits_NV, wanted_NV, temperature)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """Its gradient at the logits is ``(q − p) / temperature``, which is made on the way."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, wanted_NV: Tensor, temperature: float) -> Tensor:
        rows = max(_NUMBERS // max(logits_NV.shape[-1], 1), 1)
        needed = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(logits_NV) if needed else None
        total = wanted_NV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits_NV), rows):
            part = slice(start, start + rows)
            log_q, log_p = distribution(logits_NV[part], temperature), wanted_NV[part]
            p = log_p.exp()
            # where p is 0 its logarithm may be minus infinity
            gap = torch.where(p > 0, log_p - log_q, p)
            total += (p * gap).sum(dtype=torch.float64)
            if gradient_NV is not None:
                gradient_NV[part] = log_q.exp_().sub_(p).div_(temperature)
        ctx.save_for_backward(*([] if gradient_NV is None else [gradient_NV]))
        return total.to(wanted_NV.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        # in place: this is the only reader
        return gradient_NV.mul_(gradients[0].to(gradient_NV.dtype)), None, None


__all__ = ["distribution", "divergence_of"]
