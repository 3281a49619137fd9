"""The output moment of a slice of many outputs, in the width of its inputs.

What the planner needs of ``A = E[δ δᵀ]`` ``(O, O)`` of a slice that has more outputs than inputs is
``Wᵀ A W`` ``(I, I)`` (:mod:`fxshare.factors.decompose`): the second moment of ``Wᵀ δ``. For 768
inputs and 3072 outputs it is a sixteenth of the numbers, and half of the arithmetic.

Letters: I features in, O outputs, T rows (tokens) of one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxshare.calibration.gram import GramAccumulator, TotalOf

# rows of gradients that are in float32 at a time
_MAX_ROWS = 4096


class ProjectedAccumulator:
    """Sums ``(Wᵀ δ)(Wᵀ δ)ᵀ`` and ``δᵀ δ`` over the gradients δ that it is given, in float64, or
    products in ``dtype``.

    ``weight_OI`` is the weight whose errors are to be priced, whatever weight the model that is run
    has in its place. Products are float32, or float64 where the gradients are.
    """

    kind = "projected"

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.weight_OI = weight_OI.detach()
        self.projected = GramAccumulator(weight_OI.shape[1], dtype=dtype)
        self.square = 0.0
        """``Σ δᵀ δ``."""

    @property
    def features(self) -> int:
        """``I``."""
        return self.projected.features

    @property
    def tokens(self) -> int:
        """Rows that were added."""
        return self.projected.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held once the first rows were added."""
        return self.projected.nbytes

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Adds rows ``x: (..., O)`` of gradients; those where the bool mask ``keep`` is False are
        left out."""
        with torch.inference_mode(False), torch.no_grad():
            rows_TO = x.reshape(-1, x.shape[-1])
            if keep is not None:
                rows_TO = rows_TO[keep.reshape(-1).to(rows_TO.device)]
            dtype = torch.float64 if rows_TO.dtype == torch.float64 else torch.float32
            weight_OI = self.weight_OI.to(rows_TO.device, dtype)
            for part_TO in torch.split(rows_TO, _MAX_ROWS):
                wide_TO = part_TO.to(dtype)
                self.square += float(wide_TO.double().square().sum())
                self.projected.add(wide_TO @ weight_OI)

    def merge(self, tokens: int, total_of: TotalOf, device: torch.device) -> None:
        """As :meth:`GramAccumulator.merge`."""
        self.projected.merge(tokens, total_of, device)
        self.square = float(total_of(torch.tensor(self.square, dtype=torch.float64)))

    def state(self) -> dict[str, Tensor]:
        """The sums, to be written, but for ``δᵀ δ``."""
        return self.projected.state()

    def gram(self) -> Tensor:
        """``Wᵀ A W`` ``(I, I)``, float64, exactly symmetric."""
        return self.projected.gram()

    def trace(self) -> float:
        """The trace of ``A``."""
        return self.square / max(self.tokens, 1)
