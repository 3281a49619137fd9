"""Candidates judged by the loss that they measurably cost on held-back data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fxshare.base.processes import here
from fxshare.base.spent import part
from fxshare.calibration.distance import distance, output_rows
from fxshare.calibration.losses import Loss, default_loss, next_token_logits
from fxshare.capture import Call, Captured, quiet
from fxshare.capture.widening import free
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


Remembered = Callable[[object, Callable[[], float]], float]
"""``remembered(what, compute)``: a number that was computed before, or now."""


class Candidate:
    """The model with other weights, made when it is run, and what it is told apart by."""

    def __init__(self, make: Callable[[], Captured], what: object = None) -> None:
        self._make = make
        self._made: Captured | None = None
        self.what = what

    def made(self) -> Captured:
        """The copy."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def forget(self, shared: Captured) -> None:
        """Free the weights that are the copy's own. A graph refers to itself, so that it would
        hold them until Python looks for such circles."""
        if self._made is not None:
            kept = {id(p) for p in shared.module.parameters()}
            for parameter in self._made.module.parameters():
                if id(parameter) not in kept:
                    free(parameter)
            self._made = None


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
        remembered: Remembered | None = None,
    ) -> None:
        self._captured = captured
        self._remembered = remembered
        self._candidate: Candidate | None = None
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
        return any(here().gather(bool(self._outputs), "the loss"))

    @property
    def calls(self) -> list[float]:
        """The tokens of each call: of those of the first share alike, and of the others."""
        data = self._data
        rest = len(data.calls) - data.first
        beyond = (data.tokens - data.first_tokens) / max(rest, 1)
        return [data.first_tokens / data.first] * data.first + [beyond] * rest

    def run_dense(self, which: Sequence[int]) -> None:
        """Run the dense model on some calls, whose outputs a distance is one to."""
        self._dense(which)

    def substituted(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], what: object = None
    ) -> Candidate:
        """The model with other weights, to be judged. What was measured of an equal ``what`` is
        not measured again where results are remembered."""
        return Candidate(lambda: substituted(self._captured, self._sites, weights, biases), what)

    def first(self, on: Candidate) -> Lost:
        """What is lost on the first share of the calls."""
        return Lost(self._above_dense(on, range(self._data.first)), self._data.first_tokens)

    def is_whole(self, lost: Lost) -> bool:
        """Whether what was measured was on all calls."""
        return lost.tokens == self.tokens

    def whole(self, on: Candidate, first: Lost) -> Lost:
        """What is lost on all calls; ``first`` is what was on the first share."""
        rest = range(self._data.first, len(self._data.calls))
        return Lost(first.total + self._above_dense(on, rest), self.tokens)

    def forget(self) -> None:
        """Free the weights of the candidate that was measured last, which are as many as the
        model's; it is made again where it is measured again."""
        if self._candidate is not None:
            self._candidate.forget(self._captured)
        self._candidate = None

    def losses(self, on: Candidate, which: Iterable[int]) -> list[float]:
        """The loss itself on each of some calls, where it is no distance. Of several processes each
        runs its share of the calls, always the same ones."""
        if self._candidate is not on:  # one copy at a time
            self.forget()
            self._candidate = on

        def run(number: int) -> float:
            return self._run(on.made(), [number])[number]

        def known(number: int) -> float:
            if self._remembered is None or on.what is None:
                return run(number)
            return self._remembered((on.what, number), partial(run, number))

        numbers = list(which)
        found = here().spread(numbers, known, owner=int, at="judging")
        if here().size > 1 and self._remembered is not None and on.what is not None:
            for number, lost in zip(numbers, found, strict=True):
                self._remembered((on.what, number), partial(float, lost))  # others have run it
        return found

    def _above_dense(self, on: Candidate, which: Sequence[int]) -> float:
        base = self._dense(which)  # first: a distance is one to what the dense model computes
        lost = sum(self.losses(on, which)) - base
        return lost if math.isfinite(lost) else math.inf

    def _dense(self, which: Sequence[int]) -> float:
        missing = [number for number in which if number not in self._base]
        if missing:
            dense = substituted(self._captured, (), {}, {})

            def run(number: int) -> float:
                return self._run(dense, [number])[number]

            found = here().spread(missing, run, owner=int, at="judging")
            self._base |= zip(missing, found, strict=True)
        return sum(self._base[number] for number in which)

    @part("judge")
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
