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
        return self._times_basis(F.embedding(input, _tensor(self._rows), self.padding_idx))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product ``(V, I)``, multiplied out anew, for code that looks at it."""
        return self._times_basis(_tensor(self._rows))

    def _times_basis(self, rows: Tensor) -> Tensor:
        return rows if self._basis is None else torch.matmul(rows, _tensor(self._basis))


def _tensor(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


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
