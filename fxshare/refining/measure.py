"""The loss on data that is not trained on."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
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
from fxshare.capture.call import to_device
from fxshare.refining.objectives import Objective, data_loss
from fxshare.refining.student import Student
from fxshare.result.refinement import Measured

_LOG = logging.getLogger(__name__)
_KEPT_BYTES = 1 << 26
_IN_FILES = 1 << 30
_FREE = 4


@dataclass
class Teacher:
    """What the student is to come near to: a module in eval mode, or none."""

    module: nn.Module | None
    objective: Objective

    def targets(self, call: Call, device: torch.device) -> Any:
        """What the objective keeps of its output, on the student's device."""
        if self.module is None or not self.objective.needs_teacher:
            return None
        with torch.no_grad():
            output = self.module(**to_device(call, device_of(self.module)))
            found = self.objective.targets(output, call)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), found)


class Targets:
    """A teacher's targets by the number of the batch, so that a batch that comes again needs them
    once: the first 64 MB in memory. With ``files`` a gigabyte at most is in the system's place for
    temporary files (``TMPDIR``) for as long as this is alive, where four times that is free; what
    does not fit is computed again."""

    def __init__(self, teacher: Teacher, *, files: bool = False) -> None:
        self._teacher = teacher
        self._left = _IN_FILES if files else 0
        self._held: dict[int, Any] = {}
        self._bytes = 0
        self._folder: Path | None = None

    def of(self, number: int, call: Call, device: torch.device) -> Any:
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

    def _write(self, number: int, found: Any, size: int) -> None:
        try:
            if self._folder is None:
                self._folder = temporary_folder(self)
                if shutil.disk_usage(self._folder).free < _FREE * _IN_FILES:
                    self._left = 0
                    return
            path = self._folder / f"{number}.pt"
            torch.save(found, path)
        except (OSError, RuntimeError) as error:  # torch's, where a disk is full
            _LOG.info("refine: the teacher's outputs are not kept: %s", error)
            self._left = 0
            return
        self._left -= size
        self._held[number] = path


class Measure:
    """Measures a student on some batches; of few the teacher's targets are kept."""

    def __init__(
        self, batches: Sequence[object], caller: Callable[[object], Call], teacher: Teacher
    ) -> None:
        self._batches = batches
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
        total = data = 0.0
        count = predicted = 0
        self.bad = None
        losses = self._all_losses(student)
        for number, (value, tokens, own, targets) in enumerate(losses):
            if not math.isfinite(value) and self.bad is None:
                self.bad = number
            total, count = total + value, count + tokens
            data, predicted = data + own, predicted + targets
        self.tokens, self.seconds = count, time.monotonic() - began
        mean = total / max(count, 1)
        result = Measured(mean if math.isfinite(mean) else math.inf)
        return replace(result, data_loss=data / predicted) if predicted else result

    def _all_losses(self, student: Student) -> list[tuple[float, int, float, int]]:
        count, size = len(self._batches), here().size
        # where ranks pass together those without a batch pass along
        padded = -(-count // size) * size if student.is_sharded else count
        losses = here().spread(
            range(padded), lambda at: self._losses(student, at % count), at="measuring"
        )
        return losses[:count]

    @torch.no_grad()
    def _losses(self, student: Student, number: int) -> tuple[float, int, float, int]:
        """Of one batch: the objective's sum, over how many, and that of the data's own loss."""
        batch = self._batches[number]
        call = self._caller(batch)
        targets = self._targets.of(number, call, student.device)
        output = student(call)
        found = self._teacher.objective.loss(output, targets, call, batch)
        own = data_loss(output, call)
        if own is None:
            return float(found.total), found.count, 0.0, 0
        return float(found.total), found.count, float(own.total), own.count


__all__ = ["Measure", "Targets", "Teacher"]
