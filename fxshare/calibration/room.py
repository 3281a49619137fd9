"""A limit of memory, divided among what calibration and planning hold at once.

Of the limit goes first what the process holds already (the model), what the activations of a batch
take, a copy of the matched weights (a candidate is judged on one), and the work on one matrix. What
is left is for statistics, and for what planning keeps of its decompositions and factors. Statistics
that do not fit beside that go to disk, block by block, each with a pass over the data of its own;
activations that do not fit go there as well. Without a limit of the user's statistics above 512 MB
are in files too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fxshare.base.memory import free, resident, shown
from fxshare.base.processes import here
from fxshare.calibration.activations import activation_bytes, at_most
from fxshare.calibration.blocks import bytes_needed, largest_block
from fxshare.calibration.keeping import Keeping, Scratch, has_room
from fxshare.capture import Call, Captured
from fxshare.errors import CalibrationError
from fxshare.sites.site import Site

_LEAST_KEPT = 1 << 28
_MOST_KEPT = 1 << 30
_MOST_IN_MEMORY = 1 << 29
# activations that are written as they come need no more than this beside the largest
_OFFLOADED = 1 << 28


@dataclass(frozen=True)
class Room:
    """How a limit of resident bytes is divided; all in bytes."""

    limit: int
    resident: int
    activations: int
    work: int
    """For one matrix at a time, and a copy of the matched weights."""
    statistics: int
    kept: int
    """For decompositions and factors that may be asked for again."""
    keeping: Keeping

    def say(self, log: logging.Logger, *, asked: bool) -> None:
        """Log :meth:`told`: for all to see where the limit was ``asked`` for or sends something to
        disk."""
        shown = asked or self.keeping.folder is not None or self.keeping.offload
        log.log(logging.INFO if shown else logging.DEBUG, "%s", self.told())

    def told(self) -> str:
        """What is about to be used, in a line."""
        where = "memory" if self.keeping.folder is None else "files"
        spilled = ", those in files too" if self.keeping.offload else ""
        return (
            f"memory: at most {shown(self.limit)}, of which {shown(self.resident)} are in use, "
            f"{shown(self.activations)} for the activations of a batch{spilled}, "
            f"{shown(self.work)} for one matrix and a candidate; statistics of "
            f"{shown(self.statistics)} in {where}, {shown(self.kept)} for what is kept of them"
        )


def make_room(
    captured: Captured,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    call: Call,
    *,
    limit: int | None,
    gradients: bool,
    rounds: int = 1,
    folder: Path | None = None,
) -> Room:
    """Divide ``limit`` bytes, or where None what is in use and half of what is free, for
    statistics that are gathered in so many rounds; of several processes, for each of them.

    ``folder`` is where statistics go whether or not they would fit into memory. Raises
    :class:`CalibrationError` with what would be needed for a limit that is too small.
    """
    together = here()
    # of several processes all divide alike: that of the one which has least
    now = together.gather((resident(), free() // (2 * together.on_this_machine)), "memory")
    used = max(one for one, _ in now)
    given, limit = limit, used + min(half for _, half in now) if limit is None else limit
    needed = bytes_needed(captured, sites, gradients=gradients)
    width = max((site.in_features for site in sites if site.calls), default=1)
    work = 4 * 8 * width * width + (_bytes_of(weights) if gradients else 0)
    left = limit - used - work
    activations = at_most(captured, call)
    if rounds * needed + activations + _MOST_KEPT > left:
        activations = activation_bytes(captured, call, gradients=gradients)
    offload = gradients and activations + _LEAST_KEPT > left
    if offload:
        activations = _OFFLOADED
    left -= activations
    fits = folder is None and rounds * needed + _LEAST_KEPT <= left
    if fits and given is None and rounds * needed > _MOST_IN_MEMORY:
        # nobody asked for so much memory, and files that were just written are read at its speed
        fits = not has_room(rounds * needed)
    block = min(needed, largest_block(captured, sites, gradients=gradients)) if not fits else 0
    if not fits and max(block, _LEAST_KEPT) > left:
        least = used + work + activations + max(block, _LEAST_KEPT)
        said = f"max_memory {shown(limit)}" if given is not None else f"{shown(limit)} of memory"
        raise CalibrationError(
            f"{said} is too small: {shown(used)} are in use, {shown(work)} go to one matrix and a "
            f"candidate, {shown(activations)} to the activations of a batch, and "
            f"{shown(max(block, _LEAST_KEPT))} to statistics; set calibration: {{max_memory: "
            f"{least / 1e9 + 0.1:.1f}GB}}, give smaller batches, or match fewer weights"
        )
    kept = min(_MOST_KEPT, left - rounds * needed if fits else left)
    keeping = Keeping(offload=offload)
    if not fits:
        # what planning keeps is given back before statistics are gathered
        most = None if needed <= left else left
        keeping = Keeping(most, folder, None, offload)
        if folder is None:
            scratch = Scratch(rounds * needed)
            keeping = Keeping(most, scratch.path, scratch, offload)
    return Room(limit, used, activations, work, needed, kept, keeping)


def _bytes_of(weights: Mapping[str, Tensor]) -> int:
    return sum(w.numel() * w.element_size() for w in weights.values())


__all__ = ["Room", "make_room"]
