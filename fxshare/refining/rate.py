"""The learning rate, by trying some from the same start for a few steps each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fxshare.base.spent import part
from fxshare.refining.options import RefineOptions
from fxshare.refining.steps import Optimiser, Stepper
from fxshare.result.refinement import Measured

_LOG = logging.getLogger(__name__)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Relative to the size of each tensor."""
DEFAULT = 1e-2
"""Where there is no time to try any."""
_SHARE = 0.1
_MOST, _LEAST = 20, 4
_RAMP = 3


@part("range test")
def chosen_rate(
    stepper: Stepper,
    measure: Callable[[], Measured],
    options: RefineOptions,
    elapsed: Callable[[], float],
) -> float:
    """The rate of :data:`RATES` after which the loss is least, each tried from the present state,
    which is there again afterwards. It takes a tenth of the time or of the steps at most."""
    student = stepper.student
    start, scales = student.state(), student.scales()
    count = _MOST
    if options.steps is not None:
        count = min(count, int(_SHARE * options.steps / len(RATES)))
    if options.minutes is not None and count >= _LEAST:
        began = time.monotonic()
        optimiser = Optimiser(student, scales)
        for step in range(2):
            stepper(optimiser, step, RATES[0])
        each = (time.monotonic() - began) / 2
        student.put(start)
        left = max(options.limit - elapsed(), 0.0)
        count = min(count, int(_SHARE * left / (len(RATES) * max(each, 1e-9))))
    if count < _LEAST:
        return DEFAULT
    found: dict[float, float] = {}
    try:
        for rate in RATES:
            student.put(start)
            optimiser = Optimiser(student, scales)
            for step in range(count):
                stepper(optimiser, step, rate * min(1.0, (step + 1) / _RAMP))
            found[rate] = measure().objective
            _LOG.debug("learning rate %g: loss %.4f after %d steps", rate, found[rate], count)
    finally:
        student.put(start)
    return min(RATES, key=lambda rate: found[rate])


__all__ = ["DEFAULT", "RATES", "chosen_rate"]
