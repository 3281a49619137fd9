"""The loop: steps, held-out losses along the way, the best state, and when it ends."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from fxshare.base.processes import here
from fxshare.errors import FxShareWarning, RefineError
from fxshare.refining.checkpoint import Checkpoints
from fxshare.refining.measure import Measure
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.rate import chosen_rate
from fxshare.refining.run import Run
from fxshare.refining.shown import Shown
from fxshare.refining.steps import Stepper
from fxshare.result.refinement import Measured, Point, Stopped

_LOG = logging.getLogger(__name__)
_MARKS = 20
"""The held-out loss is measured so many times."""
_FEWEST = 4
_STEPS_BETWEEN = 4
_MEASURING = 0.15
"""The largest share of the time that measuring may take."""
_PATIENCE = 5
"""Measurements in a row that may be worse than the best one."""
_BAD = 3
"""Steps in a row that may be dropped."""
_WARM_UP = 20
_SAVED_SECONDS = 60.0


@dataclass(frozen=True)
class Training:
    """What the loop works with. ``few`` measures on a part of what is held out."""

    stepper: Stepper
    measure: Measure
    few: Callable[[], Measured]
    options: RefineOptions
    checkpoints: Checkpoints | None = None


def train(training: Training, run: Run, optimiser: Optimiser | None) -> None:
    """Train until steps or time are used up, the held-out loss rises, or Ctrl-C; ``run`` holds the
    best state then. ``optimiser`` is None for a run that begins.

    Raises :class:`RefineError` naming the batch where the loss is not finite several times in a
    row, and no state is better than the first.
    """
    if run.stopped is not None:
        return
    try:
        if optimiser is None:
            optimiser = _begun(training, run)
        with Shown(training.options) as shown:
            shown.at(run, _so_far(run, training.options))
            run.stopped = _loop(training, run, optimiser, shown)
    except KeyboardInterrupt:
        if here().size > 1:  # the others are in the middle of another step
            raise
        # the last checkpoint stays: this one may have come in the middle of a step
        run.stopped = "interrupted"
        _LOG.info("refine: interrupted at step %d; the best is that of %d", run.step, run.kept)
        return
    _save(training, run, optimiser)
    if run.stopped == "not finite":
        _say_bad(training, run)


def _begun(training: Training, run: Run) -> Optimiser:
    options, student = training.options, training.stepper.student
    run.rate = options.learning_rate or chosen_rate(
        training.stepper, training.few, options, run.elapsed
    )
    optimiser = Optimiser(student, student.scales(), options.optimiser)
    _save(training, run, optimiser)
    return optimiser


def _loop(training: Training, run: Run, optimiser: Optimiser, shown: Shown) -> Stopped:
    options = training.options
    marks = _marks(training, run)
    saved = time.monotonic()
    while True:
        progress = _progress(run, options)
        if progress >= min((run.mark + 1) / marks, 1.0):
            _measured(training, run)
            run.mark = max(run.mark + 1, int(min(progress, 1.0) * marks))
            shown.at(run, progress)
            if run.rising >= _PATIENCE:
                return "rising"
            if progress >= 1:
                return "done"
            _save(training, run, optimiser)
            saved = time.monotonic()
        elif _is_time_to_save(training, time.monotonic() - saved):
            _save(training, run, optimiser)
            saved = time.monotonic()
        rate = rate_at(run.step, progress, run.rate, options)
        taken = training.stepper(optimiser, run.step, rate)
        run.step += 1
        run.tokens += taken.tokens
        if taken.bad is None:
            run.dropped_in_a_row = 0
            shown.step(_so_far(run, options))
            continue
        run.dropped += 1
        run.dropped_in_a_row += 1
        run.bad_batch = taken.bad
        _LOG.info("refine: step %d dropped, batch %d is not finite", run.step, taken.bad)
        if run.dropped_in_a_row >= _BAD:
            return "not finite"


def rate_at(step: int, progress: float, rate: float, options: RefineOptions) -> float:
    """Linear warm-up over a few steps, then a cosine in ``progress`` (0 to 1) down to nothing."""
    steps = _WARM_UP if options.steps is None else min(_WARM_UP, max(options.steps // 10, 1))
    return rate * min(1.0, (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _progress(run: Run, options: RefineOptions) -> float:
    """How far it is, for all processes as for the first."""
    found = _so_far(run, options)
    return found if options.minutes is None else here().broadcast(found, "the time")


def _so_far(run: Run, options: RefineOptions) -> float:
    """Of steps and time whichever is further along."""
    by_steps = 0.0 if options.steps is None else run.step / options.steps
    by_time = 0.0 if options.minutes is None else run.elapsed() / options.limit
    return max(by_steps, by_time)


def _marks(training: Training, run: Run) -> int:
    options = training.options
    if options.minutes is None:
        return min(_MARKS, max((options.steps or 0) // _STEPS_BETWEEN, 1))
    most = here().broadcast(int(_MEASURING * options.limit / max(training.measure.seconds, 1e-3)))
    return min(max(most, _FEWEST), _MARKS)


def _measured(training: Training, run: Run) -> None:
    student = training.stepper.student
    found = training.measure(student)
    run.curve.append(Point(run.step, run.elapsed(), found.objective))
    if run.improved(found):
        state = student.state()
        run.best, run.state, run.kept, run.rising = found, state, run.step, 0
    else:
        run.rising += 1
    _LOG.info(
        "refine: step %d, %.0f s, held-out loss %.4f (first %.4f, best %.4f)",
        run.step,
        run.elapsed(),
        found.objective,
        run.first.objective,
        run.best.objective,
    )


def _is_time_to_save(training: Training, since: float) -> bool:
    """Whether there are checkpoints and the last one is old; for all processes alike, since they
    put their parts together for one."""
    due = since > _SAVED_SECONDS
    if training.checkpoints is None or not training.stepper.student.is_sharded:
        return due
    return here().broadcast(due, "the time")


def _save(training: Training, run: Run, optimiser: Optimiser) -> None:
    if training.checkpoints is not None:
        training.checkpoints.write(training.stepper.student, optimiser, run)


def _say_bad(training: Training, run: Run) -> None:
    what = (
        f"the loss on batch {run.bad_batch}, or its gradient, is not finite, {_BAD} steps in a row "
        f"(until step {run.step})"
    )
    if run.state is None:
        raise RefineError(
            f"{what}, and no state is better than the first; leave such batches out, or give a "
            "smaller learning_rate"
        )
    warnings.warn(
        f"{what}; the best state, of step {run.kept}, is returned", FxShareWarning, stacklevel=4
    )


__all__ = ["Training", "rate_at", "train"]
