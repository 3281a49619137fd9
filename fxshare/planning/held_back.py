"""The calibration data in two parts: what statistics come from, and what judges plans."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxshare.base.spool import Picked, Spooled
from fxshare.calibration.losses import Loss
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Call, Captured, tensors
from fxshare.capture.call import MASK
from fxshare.errors import CalibrationError
from fxshare.planning.trials import Effort

_HELD_BACK = 10
_FIRST = 3
"""All plans are judged on the first of so many shares of what is held back, the better half of them
on the others too, and there the refit is decided: of n plans with a refit to decide that is
``n/3 + (n/2)(1/3 + 2/3)`` judgings instead of ``2n``."""
_SLOPE_TOKENS = 32768


@dataclass(frozen=True)
class Parts:
    """What statistics are taken of, and what is held back from them."""

    fit: Sequence[object]
    held_back: list[tuple[Call, object]]
    """Batches as calls, and as they were given."""
    sizes: list[int]
    """Of the batches in ``fit``, see :func:`_size`."""

    def judged(self, captured: Captured, statistics: Statistics, loss: Loss | None) -> Judged:
        """What is held back, to judge plans on. Of one call alone the rows are the shares, where
        they can be cut: a loss that was given reads the batch, which cannot."""
        calls = self.held_back
        tokens = self.held_back_tokens(statistics)
        if len(calls) == 1 and loss is None:
            (call, batch) = calls[0]
            calls = [(part, batch) for part in _parted(captured, call)]
        first = -(-len(calls) // _FIRST) if len(self.held_back) > 1 else 1
        sizes = [_size(call) for call, _ in calls]
        share = sum(sizes[:first]) / max(sum(sizes), 1)
        return Judged(calls, tokens, first, max(round(tokens * share), 1))

    def held_back_tokens(self, statistics: Statistics) -> int:
        """Tokens held back, by what a token of the statistics is: a row of the busiest linear
        (of images, say, a patch)."""
        seen = sum(self.sizes[: statistics.batches])
        held = sum(_size(call) for call, _ in self.held_back)
        return max(round(statistics.tokens * held / max(seen, 1)), 1)

    def some_to_fit(
        self, captured: Captured, statistics: Statistics
    ) -> tuple[list[tuple[Call, object]], list[float]]:
        """Calls of at most :data:`_SLOPE_TOKENS` that the statistics have seen, and the tokens of
        each, counted as above."""
        seen = self.sizes[: statistics.batches]
        sums = list(itertools.accumulate(seen))
        count = max(sum(total <= _SLOPE_TOKENS for total in sums), 1)
        calls = [(captured.caller(batch), batch) for batch in self.fit[:count]]
        of_each = statistics.tokens / max(sums[-1], 1)
        return calls, [size * of_each for size in seen[:count]]


@dataclass(frozen=True)
class Judged:
    """Calls to measure a loss on, the first ``first`` of them beforehand; and how many tokens all
    and those are."""

    calls: list[tuple[Call, object]]
    tokens: int
    first: int
    first_tokens: int


def hold_back(captured: Captured, batches: Iterable[object], effort: Effort) -> Parts:
    """Every tenth batch is held back; of few batches the last one."""
    everything = batches if isinstance(batches, Sequence) else Spooled(batches)
    if effort == "off":
        return Parts(everything, [], [])
    if len(everything) < 2:
        raise CalibrationError(
            "a search needs at least 2 calibration batches, of which one is held back to judge "
            f"plans; found {len(everything)}. Give smaller batches, or planner: {{search: off}}"
        )
    step = min(_HELD_BACK, len(everything))
    numbers = range(len(everything))
    held_back = Picked(everything, numbers[step - 1 :: step])
    held = [(captured.caller(batch), batch) for batch in held_back]
    fit = Picked(everything, [i for i in numbers if i % step != step - 1])
    return Parts(fit, held, [_size(captured.caller.where_it_is(batch)) for batch in fit])


def _parted(captured: Captured, call: Call) -> list[Call]:
    """The first share of a call's rows, and the others; the call whole where capture has not seen
    that rows may be fewer, or not of every tensor."""
    shapes = captured.shapes
    given = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    if shapes is None or not given or len(given) != len(tensors(call)):
        return [call]
    rows = {len(t) if t.ndim else 0 for t in given.values()}
    if len(rows) > 1 or min(rows) < 2:
        return [call]
    base = shapes.base
    if not all(name in base and 0 in shapes.dynamic_dims(base[name]) for name in given):
        return [call]
    at = -(-min(rows) // _FIRST)
    return [
        {name: value[rows] if name in given else value for name, value in call.items()}
        for rows in (slice(at), slice(at, None))
    ]


def _size(call: Call) -> int:
    """Numbers in a call's first tensor; masked tokens do not count."""
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    return next((t.numel() for t in tensors(call)), 1)
