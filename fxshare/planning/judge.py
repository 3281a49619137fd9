"""Candidates judged by the loss that they measurably cost on held-back data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxshare.calibration.distance import distance, output_rows
from fxshare.calibration.losses import Loss, default_loss, next_token_logits
from fxshare.capture import Call, Captured, quiet
from fxshare.planning.held_back import Judged
from fxshare.sites.site import Site
from fxshare.sites.tensors import substituted


@dataclass(frozen=True)
class Lost:
    """What a substitution of weights loses above the dense model, summed over some tokens."""

    total: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The loss per token; infinite where it is not finite."""
        return self.total / max(self.tokens, 1)


class Judge:
    """Measures the loss of a substitution of weights on held-back calls.

    Runs copies of what was captured in which the sites' weights are replaced by dense ones of the
    same function as the plan's. Tokens are counted as the statistics count them: predicted and
    measured are then in one unit. The dense model's loss is that on the same calls.
    """

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[Site],
        data: Judged,
        *,
        loss: Loss | None = None,
    ) -> None:
        self._captured = captured
        self._sites = tuple(sites)
        self._data = data
        self._loss = loss
        self._outputs: dict[int, list[Tensor]] = {}
        self._base: dict[int, float] = {}

    @property
    def tokens(self) -> int:
        """All tokens held back."""
        return self._data.tokens

    @property
    def is_distance(self) -> bool:
        """Whether the loss is the distance to the dense output, which has no slope at zero."""
        self._dense([0])
        return bool(self._outputs)

    def substituted(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Captured:
        """The model with other weights, to be judged."""
        return substituted(self._captured, self._sites, weights, biases)

    def first(self, on: Captured) -> Lost:
        """What is lost on the first share of the calls."""
        return Lost(self._above_dense(on, range(self._data.first)), self._data.first_tokens)

    def is_whole(self, lost: Lost) -> bool:
        """Whether what was measured was on all calls."""
        return lost.tokens == self.tokens

    def whole(self, on: Captured, first: Lost) -> Lost:
        """What is lost on all calls; ``first`` is what was on the first share."""
        rest = range(self._data.first, len(self._data.calls))
        return Lost(first.total + self._above_dense(on, rest), self.tokens)

    def losses(self, on: Captured, which: Iterable[int]) -> list[float]:
        """The loss itself on each of some calls, where it is no distance."""
        return list(self._run(on, which).values())

    def _above_dense(self, on: Captured, which: Sequence[int]) -> float:
        base = self._dense(which)  # first: a distance is one to what the dense model computes
        lost = sum(self.losses(on, which)) - base
        return lost if math.isfinite(lost) else math.inf

    def _dense(self, which: Sequence[int]) -> float:
        missing = [number for number in which if number not in self._base]
        if missing:
            self._base |= self._run(substituted(self._captured, (), {}, {}), missing)
        return sum(self._base[number] for number in which)

    def _run(self, captured: Captured, which: Iterable[int]) -> dict[int, float]:
        for m in captured.module.modules():
            m.training = False
        found = {}
        with quiet():
            for number in which:
                call, batch = self._data.calls[number]
                found[number] = self._lost(number, captured.run(call), call, batch)
        return found

    def _lost(self, number: int, output: object, call: Call, batch: object) -> float:
        if self._loss is not None:
            return float(self._loss(output, batch))
        if next_token_logits(output, call) is not None:
            return float(default_loss(output, call)[0])
        if number not in self._outputs:  # the first run is the dense model's
            self._outputs[number] = list(output_rows(output, call))
        return distance(output, self._outputs[number], call)
