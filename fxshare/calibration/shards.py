"""A calibration that several processes share: of N ranks each runs every N-th batch, and what they
have summed up is added in the order of the ranks.

Every rank ends with the same bits. Beside one process, which adds batch by batch, sums differ by
the rounding of float64; what is counted, and the loss, which is added batch by batch here too, are
equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxshare.base.processes import Processes, here
from fxshare.calibration.gradients import Moment
from fxshare.calibration.hooked import HookStage
from fxshare.calibration.lookups import RowCounter
from fxshare.calibration.observed import GraphStage, InputObserver, TokenCounter
from fxshare.calibration.stored import Part, read_part, write_part
from fxshare.capture import Captured, quiet
from fxshare.errors import CalibrationError
from fxshare.sites.site import Site

Running = GraphStage | HookStage


@dataclass(frozen=True)
class Seen:
    """What was run, beside the sums: how many batches, the ids that samples started with, and the
    loss of each batch by its number."""

    batches: int
    starts: frozenset[int]
    losses: Mapping[int, float] = field(default_factory=dict)
    loss: str = ""

    @property
    def total_loss(self) -> float:
        """Added in the order of the batches."""
        return sum((self.losses[number] for number in sorted(self.losses)), 0.0)


def merged(running: Running, seen: Seen, device: torch.device) -> Seen:
    """Add up what all ranks have seen: the sums in ``running``, in place, and the rest."""
    together = here()
    if together.size == 1:
        return seen
    everybody = together.gather(seen, "what was run")
    if isinstance(running, HookStage):
        _complete(running, together)
    observers, sums = list(running.observers.values()), _sums(running)
    counters = [one for one in running.counting if not isinstance(one, InputObserver)]
    counts = [one.tokens for one in (*sums, *counters)], [one.unmasked for one in observers]
    everyone = together.gather(counts, "sums")
    tokens = [sum(several) for several in zip(*(one for one, _ in everyone), strict=True)]
    masks = zip(*(one for _, one in everyone), strict=True)
    for observer, unmasked in zip(observers, masks, strict=True):
        observer.unmasked = any(unmasked)
    for one, count in zip((*sums, *counters), tokens, strict=True):
        if isinstance(one, TokenCounter):
            one.tokens = count
        elif isinstance(one, RowCounter):
            one.merge(together.total)
        else:
            one.merge(count, together.total, device)
    return Seen(
        sum(one.batches for one in everybody),
        frozenset[int]().union(*(one.starts for one in everybody)),
        {number: loss for one in everybody for number, loss in one.losses.items()},
        next((one.loss for one in everybody if one.loss), ""),
    )


def _sums(running: Running) -> Sequence[Moment]:
    grams = [observer.gram for observer in running.observers.values()]
    return [*grams, *(one for tap in running.taps.values() for one in tap.grams.values())]


def _complete(running: HookStage, together: Processes) -> None:
    """Hooks know what was called, which may be less on one rank: make it the same on all."""
    widths = {name: one.gram.features for name, one in running.observers.items()}
    everybody = together.gather((dict(running.seen), widths), "what was called")
    observers: dict[str, InputObserver] = {}
    seen: dict[str, tuple[str, ...]] = {}
    for rank, (calls, found) in enumerate(everybody):
        for name, width in found.items():
            own = running.observers.get(name) or InputObserver(width, running.dtype)
            observers.setdefault(name, own)
        for name, names in calls.items():
            if seen.setdefault(name, names) != names:
                raise CalibrationError(
                    f"rank {rank}: {name!r} reads another activation than on the ranks before it, "
                    "and statistics cannot be added up; calibrate in one process, or capture a "
                    "graph"
                )
    running.observers, running.seen = observers, seen


def batches_within(
    captured: Captured, sites: Sequence[Site], batches: Sequence[object], most_tokens: int
) -> int:
    """How many batches one process would run until it has seen so many tokens. All ranks count,
    each its own batches, without gradients."""
    together = here()
    looked_up = [site for site in sites if site.lookups]
    rest = [site for site in sites if not site.lookups]
    running: Running = (
        HookStage(captured.model, sites, {}, gradients=False)
        if captured.side_by_side
        else GraphStage(captured, looked_up, {}, gradients=False, counted=rest)
    )
    tokens: dict[str, int] = {}
    try:
        for first in range(0, len(batches), together.size):
            number = first + together.rank
            before = _tokens(running)
            if number < len(batches):
                with quiet():
                    running(captured.caller(batches[number]))
            found = {name: n - before.get(name, 0) for name, n in _tokens(running).items()}
            for at, more in enumerate(together.gather(found, "tokens")):
                for name, count in more.items():
                    tokens[name] = tokens.get(name, 0) + count
                if max(tokens.values(), default=0) >= most_tokens:
                    return min(first + at + 1, len(batches))
    finally:
        running.close()
    return len(batches)


def _tokens(running: Running) -> dict[str, int]:
    if isinstance(running, HookStage):
        return {name: one.tokens for name, one in running.observers.items()}
    return {str(at): one.tokens for at, one in enumerate(running.counting)}


def written(folder: Path, part: Part, *, own: bool) -> Part:
    """The part in files: of each rank for itself where the folder is its ``own``, else written by
    the first rank and read by all."""
    together = here()
    writes = own or together.is_first
    found = write_part(folder, part) if writes else part
    together.gather(None, "statistics in files")
    return found if writes else read_part(folder, check=False)


__all__ = ["Seen", "batches_within", "merged", "written"]
