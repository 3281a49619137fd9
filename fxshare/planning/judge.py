"""Candidates judged by the loss that they measurably cost on held-back data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from fxshare.calibration.distance import distance, output_rows
from fxshare.calibration.losses import Loss, default_loss, next_token_logits
from fxshare.capture import Call, Captured, quiet
from fxshare.sites.site import Site
from fxshare.sites.tensors import substituted


class Judge:
    """Measures the loss of a substitution of weights on held-back calls.

    Runs copies of what was captured in which the sites' weights are replaced by dense ones of the
    same function as the plan's. ``tokens`` is how many
    the calls have, counted as the statistics count them: predicted and measured are then in one
    unit.
    """

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[Site],
        calls: Sequence[tuple[Call, object]],
        *,
        tokens: int,
        loss: Loss | None = None,
    ) -> None:
        self._captured = captured
        self._sites = tuple(sites)
        self._calls = list(calls)
        self._loss = loss
        self.tokens = tokens
        self._dense: dict[int, list[Tensor]] = {}

    @cached_property
    def base(self) -> float:
        """The dense model's loss per token."""
        return self._run(substituted(self._captured, (), {}, {}))

    @property
    def is_distance(self) -> bool:
        """Whether the loss is the distance to the dense output, which has no slope at zero."""
        return self.base is not None and bool(self._dense)  # once the dense model has run

    def __call__(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> float:
        """Loss per token above the dense model's; infinite where it is not finite."""
        base = self.base  # first: a distance is one to what the dense model computes
        return self.absolute(weights, biases) - base

    def absolute(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> float:
        """Loss per token, where it is no distance; infinite where it is not finite."""
        value = self._run(substituted(self._captured, self._sites, weights, biases))
        return value if math.isfinite(value) else math.inf

    def _run(self, captured: Captured) -> float:
        for m in captured.module.modules():
            m.training = False
        total = 0.0
        with quiet():
            for number, (call, batch) in enumerate(self._calls):
                total += self._lost(number, captured.run(call), call, batch)
        return total / max(self.tokens, 1)

    def _lost(self, number: int, output: object, call: Call, batch: object) -> float:
        if self._loss is not None:
            return float(self._loss(output, batch))
        if next_token_logits(output, call) is not None:
            return float(default_loss(output, call)[0])
        if number not in self._dense:  # the first run is the dense model's
            self._dense[number] = list(output_rows(output, call))
        return distance(output, self._dense[number], call)
