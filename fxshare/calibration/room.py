"""A limit of memory, divided among what calibration and planning hold at once.

Of the limit goes first what the process holds already (the model), what the activations of a batch
take, a copy of the matched weights (a candidate is judged on one), and the work on one matrix. What
is left is for statistics, and for what planning keeps of its decompositions and factors. Statistics
that do not fit beside that go to disk, block by block, each with a pass over the data of its own;
activations that do not fit go there as well. While statistics are gathered no matrix is at work,
and nothing is kept of decompositions: a block may take their place. Without a limit of the user's
statistics above 512 MB are in files too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fxshare.base.memory import free, resident, shown
from fxshare.base.processes import here
from fxshare.calibration.activations import Activations, activation_bytes, at_most
from fxshare.calibration.blocks import bytes_needed, largest_block
from fxshare.calibration.keeping import Keeping, Scratch, has_room
from fxshare.capture import Call, Captured
from fxshare.errors import CalibrationError
from fxshare.sites.site import Site

_LEAST_KEPT = 1 << 28
_MOST_KEPT = 3 << 28
# of the bytes of statistics: what planning asks for again grows with the layers as they do
_MOST_KEPT_SHARE = 1.25
_MOST_IN_MEMORY = 1 << 29
# square matrices of a group's width that are there at once: a moment as it is kept, expanded and
# pooled, its root, the sum of the members' products and one of them, and two of the congruence
_AT_WORK = 8
# activations that are written as they come need no more than this beside the largest
_OFFLOADED = 1 << 28
# rows and weights in float32, a sum that is being written, and what an allocator keeps
_BESIDE_SUMS = 1 << 28


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
    whole = used + min(half for _, half in now) if limit is None else limit
    needed = bytes_needed(captured, sites, gradients=gradients)
    space = Space(
        resident=used,
        statistics=needed,
        rounds=rounds,
        block=lambda: min(needed, largest_block(captured, sites, gradients=gradients)),
        work=work_bytes(sites),
        candidate=_bytes_of(weights) if gradients else 0,
        at_most=at_most(captured, call),
        activations=lambda: activation_bytes(captured, call, gradients=gradients),
        offloads=gradients,
    )
    divided = divide(space, whole, asked=limit is not None, folder=folder)
    if divided.limit < divided.least:
        raise CalibrationError(divided.refusal(given=limit is not None))
    keeping = Keeping(offload=divided.offload)
    if not divided.fits:
        # what planning keeps is given back before statistics are gathered
        most = None if needed <= divided.block else divided.block
        keeping = Keeping(most, folder, None, divided.offload)
        if folder is None:
            scratch = Scratch(rounds * needed)
            keeping = Keeping(most, scratch.path, scratch, divided.offload)
    return Room(
        divided.limit,
        space.resident,
        divided.activations,
        space.work + space.candidate,
        needed,
        divided.kept,
        keeping,
    )


@dataclass(frozen=True)
class Space:
    """What takes memory while calibrating and planning, in bytes.

    ``statistics`` are those of a round, ``block()`` the least of them that has to be in memory at
    a time, ``work`` one matrix, ``candidate`` a copy of the matched weights. The activations of
    a batch are ``at_most`` so many, and by a closer look, which takes time, ``activations()``;
    where the loss is differentiated all but the largest may go to a file (``offloads``).
    """

    resident: int
    statistics: int
    rounds: int
    block: Callable[[], int]
    work: int
    candidate: int
    at_most: int
    activations: Callable[[], Activations]
    offloads: bool


@dataclass(frozen=True)
class Divided:
    """A limit of memory, divided: where statistics do not ``fit`` they go to files, in parts of at
    most ``block`` bytes; ``left`` is for what planning keeps, and ``least`` what it takes at
    least."""

    space: Space
    limit: int
    activations: int
    offload: bool
    left: int
    block: int
    fits: bool
    kept: int
    least: int

    def refusal(self, *, given: bool) -> str:
        """Why a limit below the least is too small, and the way out."""
        space, said = self.space, f"max_memory {shown(self.limit)}"
        statistics = max(0 if self.fits else space.block(), _LEAST_KEPT)
        return (
            f"{said if given else f'{shown(self.limit)} of memory'} is too small: "
            f"{shown(space.resident)} are in use, {shown(space.work + space.candidate)} go to one "
            f"matrix and a candidate, {shown(self.activations)} to the activations of a batch, and "
            f"{shown(statistics)} to statistics; set calibration: {{max_memory: "
            f"{self.least / 1e9 + 0.1:.1f}GB}}, give smaller batches, or match fewer weights"
        )


def divide(space: Space, limit: int, *, asked: bool, folder: object = None) -> Divided:
    """Divide ``limit`` bytes. With a folder statistics go there whether or not they would fit; and
    to files where they are many and nobody ``asked`` for the limit."""
    beside = limit - space.resident - space.candidate
    activations = offloaded = space.at_most
    statistics = space.rounds * space.statistics
    most_kept = max(_MOST_KEPT, int(_MOST_KEPT_SHARE * space.statistics))
    if statistics + activations + most_kept > beside - space.work:
        activations, in_memory = space.activations()
        offloaded = _OFFLOADED + in_memory
    most = beside - _BESIDE_SUMS
    # a pass over the data is dearer than activations that are written and read again
    offload = space.offloads and activations > offloaded
    offload = offload and _passes(space, most - offloaded) < _passes(space, most - activations)
    if offload:
        activations = offloaded
    left = beside - space.work - activations
    fits = folder is None and statistics + _LEAST_KEPT <= left
    if fits and not asked and statistics > _MOST_IN_MEMORY:
        # nobody asked for so much memory, and files that were just written are read at its speed
        fits = not has_room(statistics)
    kept = min(most_kept, left - statistics if fits else left)
    block = 0 if fits else space.block()
    least = space.resident + space.candidate + activations
    least += max(block + _BESIDE_SUMS, space.work + _LEAST_KEPT)
    return Divided(space, limit, activations, offload, left, most - activations, fits, kept, least)


def _passes(space: Space, most: int) -> float:
    """How often the data is gone through where so many bytes of statistics are in memory."""
    return math.ceil(space.statistics / most) if most >= space.block() else math.inf


def work_bytes(sites: Sequence[Site]) -> int:
    """For the matrices of one group at a time."""
    width = max((site.in_features for site in sites if site.calls), default=1)
    return _AT_WORK * 8 * width * width


def _bytes_of(weights: Mapping[str, Tensor]) -> int:
    return sum(w.numel() * w.element_size() for w in weights.values())


__all__ = ["Divided", "Room", "Space", "divide", "make_room", "work_bytes"]
