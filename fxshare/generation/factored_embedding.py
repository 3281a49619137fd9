"""An embedding of a model's own class over factors: what runs where no graph can."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FactoredEmbedding(nn.Embedding):
    """Looks rows of a coefficient up and multiplies them by a basis.

    ``rows`` and ``basis`` own the tensors ``(V, R)`` and ``(R, I)``; without a basis ``rows`` owns
    the weight itself. They may be another module's, such as a head's that is tied to the embedding,
    and are not registered here.
    """

    _rows: nn.Module
    _basis: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``(..., I)`` of the product, by their numbers ``(...)``."""
        rows: Tensor = self._rows.weight  # type: ignore[assignment]
        found = F.embedding(input, rows, self.padding_idx)
        return found if self._basis is None else torch.matmul(found, self._basis.weight)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product ``(V, I)``, multiplied out anew, for code that looks at it."""
        rows: Tensor = self._rows.weight  # type: ignore[assignment]
        return rows if self._basis is None else torch.matmul(rows, self._basis.weight)  # type: ignore[arg-type]


def factored(embedding: nn.Embedding, rows: nn.Module, basis: nn.Module | None) -> nn.Module:
    """An embedding like ``embedding``, of a subclass of its class, over these factors.

    What its class does before and after the lookup (a scale, an offset of positions) stays, as long
    as it calls ``nn.Embedding``'s ``forward``, or reads the weight.
    """
    own = type(embedding)
    bases = (FactoredEmbedding,) if own is nn.Embedding else (own, FactoredEmbedding)
    result: nn.Module = nn.Module.__new__(type(f"{own.__name__}Factored", bases, {}))
    result.__dict__.update(embedding.__dict__)
    parameters = {n: p for n, p in embedding._parameters.items() if n != "weight"}
    result.__dict__.update(_parameters=parameters, _buffers=dict(embedding._buffers))
    result.__dict__.update(_rows=rows, _basis=basis)
    return result
