"""The learning rate, by trying some from the same start for a few steps each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from fxshare.base.processes import here
from fxshare.base.spent import part
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.steps import Stepper
from fxshare.result.refinement import Measured

_LOG = logging.getLogger(__name__)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Relative to the size of each tensor."""
DEFAULT = 3e-3
"""Where there is no time to try any."""
_FIRST = RATES.index(3e-3)
_SHARE = 0.1
_TRIED = 4
"""So many are tried, as a rule."""
_MOST, _LEAST = 40, 4


@part("range test")
def chosen_rate(
    stepper: Stepper,
    measure: Callable[[], Measured],
    options: RefineOptions,
    elapsed: Callable[[], float],
) -> float:
    """The rate of :data:`RATES` after which the loss is least, each tried from the present state,
    which is there again afterwards. It takes about a tenth of the time or of the steps.

    Each trial is a short run of its own with a cosine: at a constant rate the noise of the last
    steps speaks against every rate that would be good in a longer run (stories260K at 0.80 kept:
    1e-3 was chosen, 3e-3 is better). From the middle they are tried in the direction in which the
    loss falls.
    """
    student = stepper.student
    count = _steps_each(stepper, options, elapsed)
    if count < _LEAST:
        return DEFAULT
    start, scales = student.state(), student.scales()
    found: dict[int, float] = {}

    def after(number: int) -> float:
        if not 0 <= number < len(RATES):
            return math.inf
        if number not in found:
            student.put(start)
            optimiser = Optimiser(student, scales, options.optimiser)
            for step in range(count):
                stepper(optimiser, step, RATES[number] * _shape(step, count))
            found[number] = measure().objective
            _LOG.debug("learning rate %g: loss %.4f", RATES[number], found[number])
        return found[number]

    try:
        best = _FIRST
        direction = -1 if after(best - 1) < after(best) else 1
        while after(best + direction) < after(best):
            best += direction
    finally:
        student.put(start)
    return RATES[best] if math.isfinite(found[best]) else RATES[0]


def _steps_each(stepper: Stepper, options: RefineOptions, elapsed: Callable[[], float]) -> int:
    count = _MOST
    if options.steps is not None:
        count = min(count, int(_SHARE * options.steps / _TRIED))
    if options.minutes is None or count < _LEAST:
        return count
    student = stepper.student
    start = student.state()
    optimiser = Optimiser(student, student.scales(), options.optimiser)
    began = time.monotonic()
    try:
        for step in range(2):
            stepper(optimiser, step, RATES[0])
    finally:
        student.put(start)
    each = (time.monotonic() - began) / 2
    left = max(options.limit - elapsed(), 0.0)
    return here().broadcast(min(count, int(_SHARE * left / (_TRIED * max(each, 1e-9)))))


def _shape(step: int, count: int) -> float:
    warm = min(1.0, (step + 1) / max(count // 10, 3))
    return warm * 0.5 * (1 + math.cos(math.pi * step / count))


__all__ = ["DEFAULT", "RATES", "chosen_rate"]
