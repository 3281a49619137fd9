"""The loss on data that is not trained on."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshare.base.processes import here
from fxshare.base.spent import part
from fxshare.base.unfinished import temporary_folder
from fxshare.capture import Call, device_of
from fxshare.capture.call import as_float32, to_device
from fxshare.errors import FxShareError, RefineError
from fxshare.refining.objectives import Objective, Summed, data_loss
from fxshare.refining.parts import parts_of
from fxshare.refining.student import Student
from fxshare.result.refinement import Measured

_LOG = logging.getLogger(__name__)
_KEPT_BYTES = 1 << 26
_IN_FILES = 1 << 30
_FREE = 4


@contextlib.contextmanager
def in_the_model(name: str) -> Iterator[None]:
    """Say of which batch a model's own error is: :class:`RefineError` for what is none of ours."""
    try:
        yield
    except (FxShareError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise RefineError(
            f"{name} failed in the model: {type(error).__name__}: {first:.300}; check its shapes "
            "and token ids"
        ) from error


@dataclass
class Teacher:
    """What the student is to come near to: a module in eval mode, or none; with ``wide`` it takes
    float32."""

    module: nn.Module | None
    objective: Objective
    wide: bool = False

    def targets(self, call: Call, device: torch.device) -> Any:
        """What the objective keeps of its output, on the student's device."""
        if self.module is None or not self.objective.needs_teacher:
            return None
        with torch.no_grad():
            given = to_device(call, device_of(self.module))
            output = self.module(**(as_float32(given) if self.wide else given))
            found = self.objective.targets(output, call)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), found)


class Targets:
    """A teacher's targets by the number of the batch and of its part, so that a batch that comes
    again needs them once: the first 64 MB in memory. With ``files`` a gigabyte at most is in the
    system's place for temporary files (``TMPDIR``) for as long as this is alive, where four times
    that is free; what does not fit is computed again."""

    def __init__(self, teacher: Teacher, *, files: bool = False) -> None:
        self._teacher = teacher
        self._left = _IN_FILES if files else 0
        self._held: dict[tuple[int, int], Any] = {}
        self._bytes = 0
        self._folder: Path | None = None

    def of(self, number: tuple[int, int], call: Call, device: torch.device) -> Any:
        """Those of a batch, on ``device``."""
        if number in self._held:
            found = self._held[number]
            return torch.load(found, weights_only=True) if isinstance(found, Path) else found
        found = self._teacher.targets(call, device)
        size = sum(t.nbytes for t in pytree.tree_leaves(found) if isinstance(t, Tensor))
        if self._bytes + size <= _KEPT_BYTES:
            self._bytes += size
            self._held[number] = found
        elif size <= self._left and device.type == "cpu":
            self._write(number, found, size)
        return found

    def _write(self, number: tuple[int, int], found: Any, size: int) -> None:
        try:
            if self._folder is None:
                self._folder = temporary_folder(self)
                if shutil.disk_usage(self._folder).free < _FREE * _IN_FILES:
                    self._left = 0
                    return
            path = self._folder / f"{number[0]}_{number[1]}.pt"
            torch.save(found, path)
        except (OSError, RuntimeError) as error:  # torch's, where a disk is full
            _LOG.info("refine: the teacher's outputs are not kept: %s", error)
            self._left = 0
            return
        self._left -= size
        self._held[number] = path


class Measure:
    """Measures a student on some batches, which messages call ``name``; of few the teacher's
    targets are kept."""

    def __init__(
        self,
        batches: Sequence[object],
        caller: Callable[[object], Call],
        teacher: Teacher,
        name: str = "held-out batch",
    ) -> None:
        self._batches = batches
        self._name = name
        self._caller = caller
        self._teacher = teacher
        self._targets = Targets(teacher)
        self.tokens = 0
        """That the last measurement was on."""
        self.bad: int | None = None
        """The batch of the last measurement whose loss was not finite."""
        self.seconds = 0.0
        """That the last measurement took."""

    @part("measure")
    def __call__(self, student: Student) -> Measured:
        """The losses of its present state; infinite where they are not finite."""
        began = time.monotonic()
        student.round()
        data, predicted = 0.0, 0
        self.bad = None
        losses = self._all_losses(student)
        for number, (found, own, targets) in enumerate(losses):
            if not math.isfinite(float(found.mean)) and self.bad is None:
                self.bad = number
            data, predicted = data + own, predicted + targets
        total = functools.reduce(operator.add, (found for found, _, _ in losses))
        self.tokens, self.seconds = total.count, time.monotonic() - began
        mean = float(total.mean)
        result = Measured(mean if math.isfinite(mean) else math.inf)
        return replace(result, data_loss=data / predicted) if predicted else result

    def _all_losses(self, student: Student) -> list[tuple[Summed, float, int]]:
        count, size = len(self._batches), here().size
        # where ranks pass together those without a batch pass along
        padded = -(-count // size) * size if student.is_sharded else count
        losses = here().spread(
            range(padded), lambda at: self._losses(student, at % count), at="measuring"
        )
        return losses[:count]

    @torch.no_grad()
    def _losses(self, student: Student, number: int) -> tuple[Summed, float, int]:
        """Of one batch: the objective's, and the data's own loss with how many it is of."""
        batch = self._batches[number]
        objective = self._teacher.objective
        # ranks that have parts of what is trained run equally many passes
        whole = student.is_sharded or not objective.adds_up
        losses, data, predicted = [], 0.0, 0
        for at, one in enumerate([batch] if whole else parts_of(batch)):
            call = self._caller(one)
            with in_the_model(f"{self._name} {number}"):
                targets = self._targets.of((number, at), call, student.device)
                output = student(call)
            losses.append(objective.loss(output, targets, call, one).to_sum())
            own = data_loss(output, call)
            if own is not None:
                data, predicted = data + float(own.total), predicted + own.count
        return functools.reduce(operator.add, losses), data, predicted


__all__ = ["Measure", "Targets", "Teacher", "in_the_model"]
