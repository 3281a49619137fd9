"""One step of training: gradients of some batches, and the optimiser's."""

from __future__ import annotations

import functools
import logging
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxshare.base.processes import here
from fxshare.base.spent import part
from fxshare.capture import Call
from fxshare.errors import FxShareWarning, RefineError
from fxshare.refining.batches import Batches
from fxshare.refining.measure import Targets, Teacher, in_the_model
from fxshare.refining.objectives import Summed
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.parts import parts_of
from fxshare.refining.recompute import is_short, recomputed
from fxshare.refining.student import Student

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """One step: how many tokens, and the batch whose loss or gradient was not finite, for which it
    had no effect."""

    tokens: int
    bad: int | None = None


class Stepper:
    """Takes steps of a student on the batches, one optimiser after the other."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        batches: Batches,
        caller: Callable[[object], Call],
        options: RefineOptions,
    ) -> None:
        self.student = student
        self._objective = teacher.objective
        self._targets = Targets(teacher, files=True)
        self._batches = batches
        self._caller = caller
        self._options = options
        self._module = _module(student, caller(batches.fit[0]), options)
        self._run: Callable[..., Any] = self._module
        if options.compile:
            self._run = torch.compile(self._module)
        self._autocast = _casts(student, options.autocast)

    @part("step")
    def __call__(self, optimiser: Optimiser, step: int, rate: float) -> Taken:
        """Step number ``step``, from 0, at a rate."""
        self.student.round()
        count, together = self._options.accumulate, here()
        own = self._gradients(step * count, range(together.rank, count, together.size))
        parts = together.gather(own, "a step")
        tokens = sum(found for found, _ in parts)
        bad_places = [place for _, place in parts if place is not None]
        last = min(bad_places, default=count - 1)
        number = self._batches.at(step * count + last)
        bad = self._batches.numbers[number] if bad_places else None
        if bad is None and not self.student.has_gradients():
            raise RefineError(
                "the loss reaches none of the trained parameters: the graph runs without "
                "gradients, or what was given as loss does not use the output"
            )
        gradients = self.student.gradients()
        if bad is None:
            gradients = {
                name: part if self.student.has_part_of(name) else together.total(part)
                for name, part in gradients.items()
            }
        if bad is None and not optimiser.step(gradients, rate):
            if self.student.scaled_down():  # float16 overflows first
                return Taken(0)
            bad = self._batches.numbers[number]
        return Taken(tokens if bad is None else 0, bad)

    def _gradients(self, start: int, places: range) -> tuple[int, int | None]:
        """Add the gradients of some of the batches from ``start`` on: the tokens, and the place of
        one whose loss is not finite, after which there are no more unless ranks pass together."""
        tokens, bad = 0, None
        for place in places:
            found = self._gradient(self._batches.at(start + place))
            if found is not None:
                tokens += found
                continue
            bad = place if bad is None else bad
            if not self.student.is_sharded:
                break
        return tokens, bad

    def _gradient(self, number: int) -> int | None:
        """Add the gradient of a batch, by its number; its tokens, or None where the loss is not
        finite."""
        student, share = self.student, 1 / self._options.accumulate
        batch = self._batches.fit[number]
        # ranks that have parts of what is trained run equally many passes
        whole = student.is_sharded or not self._objective.adds_up
        with torch.enable_grad(), student.offloading(self._options.offload):
            losses = [
                self._loss(one, (number, at))
                for at, one in enumerate([batch] if whole else parts_of(batch))
            ]
            found = functools.reduce(operator.add, losses)
            mean = found.mean
            finite = math.isfinite(float(mean.detach()))
            if mean.requires_grad and (finite or student.is_sharded):
                student.backward(mean, share=share)
        return found.count if finite else None

    def _loss(self, batch: object, number: tuple[int, int]) -> Summed:
        """Of a batch or a part of it, with the number that its targets are kept by."""
        call = self._caller(batch)
        cast = torch.autocast(self.student.device.type, torch.bfloat16, enabled=self._autocast)
        with in_the_model(f"batch {self._batches.numbers[number[0]]}"):
            targets = self._targets.of(number, call, self.student.device)
            with cast:
                output = self._output(call)
        return self._objective.loss(output, targets, call, batch)

    def _output(self, call: Any) -> Any:
        if self._run is self._module:
            return self.student(call, run=self._run)
        try:
            return self.student(call, run=self._run)
        except Exception as error:
            if isinstance(error, (torch.OutOfMemoryError, RefineError)):
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"the step cannot be compiled ({type(error).__name__}: {first:.200}) and runs as "
                "it is",
                FxShareWarning,
                stacklevel=2,
            )
            self._run = self._module
            return self.student(call, run=self._run)


def _module(student: Student, call: Call, options: RefineOptions) -> nn.Module:
    """What computes the outputs whose gradients are taken."""
    if options.recompute:
        return recomputed(student)
    if options.recompute is None and not options.offload and _is_short(student, call):
        try:
            return recomputed(student)
        except RefineError as error:  # nobody has asked for it
            _LOG.info("refine: %s", error)
    return student.module


def _is_short(student: Student, call: Call) -> bool:
    """Whether memory is short on any rank: all compute the same way."""
    return any(here().gather(is_short(student, call), "memory for activations"))


def _casts(student: Student, wanted: bool | None) -> bool:
    """Whether the student runs under autocast: as wanted, else on a GPU that has bfloat16 and for a
    model in float32. On a CPU it did not pay: 119 steps against 153 in 40 s, with AMX
    (stories260K)."""
    full = student.dtypes == {torch.float32}
    if wanted is not None:
        return wanted and full
    return full and student.device.type == "cuda" and torch.cuda.is_bf16_supported()


__all__ = ["Stepper", "Taken"]
