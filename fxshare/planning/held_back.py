"""The calibration data in two parts: what statistics come from, and what judges plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fxshare.calibration.statistics import Statistics
from fxshare.capture import Call, Captured, tensors
from fxshare.capture.call import MASK
from fxshare.errors import CalibrationError
from fxshare.planning.trials import Effort

_HELD_BACK = 10
_SLOPE_TOKENS = 32768


@dataclass(frozen=True)
class _Data:
    fit: list[object]
    held_back: list[tuple[Call, object]]
    """Batches as calls, and as they were given."""
    sizes: list[int]
    """Of the batches in ``fit``, see :func:`_size`."""

    def held_back_tokens(self, statistics: Statistics) -> int:
        """Tokens held back, by what a token of the statistics is: a row of the busiest linear
        (of images, say, a patch)."""
        seen = sum(self.sizes[: statistics.batches])
        held = sum(_size(call) for call, _ in self.held_back)
        return max(round(statistics.tokens * held / max(seen, 1)), 1)

    def some_to_fit(
        self, captured: Captured, statistics: Statistics
    ) -> tuple[list[tuple[Call, object]], int]:
        """Calls of at most :data:`_SLOPE_TOKENS` that the statistics have seen, and their tokens,
        counted as above."""
        seen = self.sizes[: statistics.batches]
        sums = list(itertools.accumulate(seen))
        count = max(sum(total <= _SLOPE_TOKENS for total in sums), 1)
        calls = [(captured.caller(batch), batch) for batch in self.fit[:count]]
        return calls, max(round(statistics.tokens * sums[count - 1] / max(sums[-1], 1)), 1)


def hold_back(captured: Captured, batches: Iterable[object], effort: Effort) -> _Data:
    """Every tenth batch is held back; of few batches the last one."""
    everything = list(batches)
    if effort == "off":
        return _Data(everything, [], [])
    if len(everything) < 2:
        raise CalibrationError(
            "a search needs at least 2 calibration batches, of which one is held back to judge "
            f"plans; found {len(everything)}. Give smaller batches, or planner: {{search: off}}"
        )
    step = min(_HELD_BACK, len(everything))
    held = [(captured.caller(batch), batch) for batch in everything[step - 1 :: step]]
    fit = [b for i, b in enumerate(everything) if i % step != step - 1]
    return _Data(fit, held, [_size(captured.caller.where_it_is(batch)) for batch in fit])


def _size(call: Call) -> int:
    """Numbers in a call's first tensor; masked tokens do not count."""
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    return next((t.numel() for t in tensors(call)), 1)
