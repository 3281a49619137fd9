"""What calibration knows of a weight whose rows are looked up.

Legend: V rows (tokens of the vocabulary), I width of a row.

An error ``Δ`` ``(V, I)`` of an embedding costs, in the second-order model of the loss,
``½ Σ_v n_v Δ_v A Δ_vᵀ``: ``n_v`` is how often row v is looked up per token, ``A = E[δ δᵀ]`` the
second moment ``(I, I)`` of the gradient at what was looked up. One that multiplies (an output
projection) costs ``½ Σ_v a_v Δ_v G Δ_vᵀ`` with the Gram G of its input and, where V is large, the
diagonal ``a`` of its gradient's moment alone. Both are weights on rows times a matrix on columns
(K-FAC, arXiv 1503.05671, with the sides exchanged), so an embedding is factorised like any linear.
A weight with readers of both kinds gets the product whose row weights and column matrix are the
two marginals of the sum: exact in trace, and exact where one of the readers dominates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxshare.calibration.gram import Summed, TotalOf


class RowCounter(nn.Module):
    """Counts the row numbers that it sees."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.counts_V = torch.zeros(rows, dtype=torch.float64)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Take in row numbers ``(...)``; those where ``mask`` is 0 are left out."""
        seen = ids.detach().reshape(-1)
        if mask is not None and mask.numel() == seen.numel():
            seen = seen[mask.reshape(-1).bool()]
        counted = torch.bincount(seen.long(), minlength=self.rows)
        self.counts_V = self.counts_V + counted.to(self.counts_V)

    def merge(self, total_of: TotalOf) -> None:
        """Take in what other processes have counted."""
        self.counts_V = total_of(self.counts_V)

    @property
    def tokens(self) -> int:
        """How many numbers were seen."""
        return int(self.counts_V.sum())


@dataclass(frozen=True)
class LookupStatistics:
    """Of one lookup: how often each row was read, and the gradient at what was read (None where no
    gradients were gathered)."""

    counter: RowCounter
    gradient: Summed | None

    @property
    def tokens(self) -> int:
        """Rows that were read."""
        return self.counter.tokens

    def share_V(self) -> Tensor:
        """The share ``(V,)`` of the lookups that read each row. Rows that no token of the
        calibration data read count as one lookup would (Laplace): some text will read them."""
        counts = self.counter.counts_V
        return (counts + 1) / (counts.sum() + len(counts))


@dataclass(frozen=True)
class LookedUpSite:
    """The lookups of a site, the name of its one slice, and the width of its rows."""

    slice_name: str
    width: int
    parts: tuple[LookupStatistics, ...]


@dataclass(frozen=True)
class Metric:
    """The loss per token of an error ``Δ`` ``(V, I)``: ``½ Σ_v rows_V[v] Δ_v columns_II Δ_vᵀ``."""

    rows_V: Tensor
    columns_II: Tensor


def metric(
    parts: Sequence[LookupStatistics], tokens: int, multiplied: Metric | None = None
) -> Metric:
    """The metric of a weight with these lookups and, where it multiplies as well, that reader's.

    ``tokens`` are those of the calibration data, which losses are counted per.
    """
    terms = [] if multiplied is None else [multiplied]
    for part in parts:
        if part.gradient is not None and part.tokens:
            columns_II = part.gradient.gram()
            scale = part.tokens / max(tokens, 1)
            # numbers of rows are counted on the CPU, wherever the model is
            terms.append(Metric((part.share_V() * scale).to(columns_II.device), columns_II))
    if len(terms) == 1:
        return terms[0]
    columns = torch.stack([one.rows_V.sum() * one.columns_II for one in terms]).sum(0)
    rows = torch.stack([one.rows_V * one.columns_II.trace() for one in terms]).sum(0)
    trace = columns.trace()
    return Metric(rows / trace if trace > 0 else rows, columns)


def gram_without_gradients(gram_II: Tensor | None, width: int) -> Tensor:
    """What an embedding is factorised by where no gradients were gathered: the identity (an error
    counts alike in every direction), or where the weight multiplies as well, both at one scale."""
    identity = torch.eye(width, dtype=torch.float64)
    if gram_II is None:
        return identity
    mean = gram_II.diagonal().mean()
    identity = identity.to(gram_II.device)
    return identity if mean <= 0 else (gram_II / mean + identity) / 2
