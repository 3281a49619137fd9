"""Where a run of refining is, in numbers that a checkpoint holds."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fxshare.result.refinement import BlockLoss, Measured, Point, Stopped


@dataclass
class Run:
    """What changes from step to step, but for the optimiser's state."""

    first: Measured
    best: Measured
    second: Measured | None = None
    """Of the first state, on the second corpus."""
    rate: float = 0.0
    step: int = 0
    tokens: int = 0
    mark: int = 0
    """How many times the held-out loss was measured after the first; with blocks, how many are
    done."""
    rising: int = 0
    """Measurements since the best one."""
    dropped: int = 0
    dropped_in_a_row: int = 0
    kept: int = 0
    """The step of the best state."""
    seconds: float = 0.0
    """Of the processes before this one, or when it was saved."""
    stopped: Stopped | None = None
    bad_batch: int | None = None
    curve: list[Point] = field(default_factory=list)
    blocks: list[BlockLoss] = field(default_factory=list)
    state: dict[str, Tensor] | None = None
    """The best state; None while that is the first one."""
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds until now."""
        return self.seconds + time.monotonic() - self.started

    def improved(self, found: Measured) -> bool:
        """Whether a measurement is better than the best one."""
        return found.objective < self.best.objective and math.isfinite(found.objective)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data, at this moment."""
        left_out = ("state", "started")
        # not asdict of the whole: it would copy the tensors of the best state
        plain = {name: value for name, value in vars(self).items() if name not in left_out}
        for name in ("first", "best", "second"):
            plain[name] = None if plain[name] is None else asdict(plain[name])
        plain["curve"] = [asdict(point) for point in self.curve]
        plain["blocks"] = [asdict(block) for block in self.blocks]
        plain["seconds"] = self.elapsed()
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any], state: dict[str, Tensor] | None) -> Run:
        """The inverse of :meth:`to_dict`, with the best state."""
        values = dict(plain)
        for name in ("first", "best", "second"):
            values[name] = None if values[name] is None else Measured(**values[name])
        values["curve"] = [Point(**point) for point in values["curve"]]
        given = values.get("blocks", ())
        values["blocks"] = [BlockLoss(**{**one, "layers": tuple(one["layers"])}) for one in given]
        return Run(**values, state=state)


__all__ = ["Run"]
