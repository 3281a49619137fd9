"""Example calls as specs, and random calls like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSpec:
    """Shape, dtype and range of one example tensor; enough to make another like it."""

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float

    @staticmethod
    def of(t: Tensor) -> InputSpec:
        """The spec of a tensor; on the meta device its range is 0 to 1.

        Infinities, as in an additive mask, are left out of the range: numbers drawn between them
        would be NaN, and NaN would hide every difference. So are negative integers beside others:
        they are marks, such as the -100 of labels.
        """
        finite = t if t.device.type == "meta" else t[t.isfinite()]
        known = finite.device.type != "meta" and finite.numel() > 0
        low, high = (float(finite.min()), float(finite.max())) if known else (0.0, 1.0)
        if not t.is_floating_point() and high >= 0:
            low = max(low, 0.0)
        return InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."), low, high)

    def random(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Uniform numbers in the range, of the shape and dtype. A range of one value stays."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return (self.low + unit * (self.high - self.low)).to(device=device, dtype=dtype)
        low, high = int(self.low), int(self.high)
        return torch.randint(low, high + 1, self.shape, generator=generator).to(
            device=device, dtype=dtype
        )
