"""What plans of one model have in common, whatever their budget, kinds and widths: its statistics,
what is priced on them, and what judges plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fxshare.base.memory import give_back
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.keeping import Keeping
from fxshare.calibration.losses import Loss
from fxshare.calibration.room import Room, make_room
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Captured
from fxshare.config import Planner, ShareConfig
from fxshare.factors.metric import SliceStatistics, slice_statistics
from fxshare.planning.finalists import Calls
from fxshare.planning.held_back import Judged, Parts, hold_back
from fxshare.planning.judge import Judge, Remembered
from fxshare.planning.kinds.kind import FoundPart, Kind
from fxshare.planning.kinds.named import kinds_and_parts
from fxshare.planning.priced import Known
from fxshare.planning.work import Work
from fxshare.sites.site import Site, Skipped
from fxshare.sites.tensors import site_biases

_LOG = logging.getLogger(__name__)
Gather = Callable[[Captured, int], Statistics]  # on what was captured, of a round


@dataclass(eq=False)
class Gathered:
    """Statistics of a model on calibration data, for plans under configurations that differ in
    their budget and in kinds, widths and search of their planner."""

    captured: Captured
    sites: Sequence[Site]
    skipped: Sequence[Skipped]
    weights: Mapping[str, Tensor]
    data: Parts
    room: Room
    gather: Gather
    statistics: Statistics
    slices: Mapping[str, SliceStatistics]
    judge: Judge | None
    fit: Calls | None
    """Some of the calls that the statistics were taken of; none without a judge."""
    work: Work | None
    known: Known = field(default_factory=Known)
    _kinds: dict[tuple[str, ...], tuple[tuple[Kind, ...], tuple[FoundPart, ...]]] = field(
        default_factory=dict
    )

    def kinds(self, planner: Planner) -> tuple[tuple[Kind, ...], tuple[FoundPart, ...]]:
        """The kinds that a configuration names, and what they may take."""
        names = tuple(planner.kinds)
        if names not in self._kinds:
            self._kinds[names] = kinds_and_parts(planner, self.captured, self.sites)
        return self._kinds[names]

    def in_metric(self, statistics: Statistics, planner: Planner) -> Mapping[str, SliceStatistics]:
        """Statistics of this model, or of a compressed one, slice by slice."""
        return slice_statistics(
            self.sites,
            self.weights,
            statistics,
            biases=site_biases(self.captured.model, self.sites),
            centred=planner.bias,
            most_bytes=self.kept_of_slices,
        )

    @property
    def kept_of_slices(self) -> int:
        """Of the room for what may be asked for again, the bytes for statistics of slices."""
        return self.room.kept // 4


def gathered(
    captured: Captured,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    weights: Mapping[str, Tensor],
    batches: Iterable[object],
    cfg: ShareConfig,
    *,
    loss: Loss | None,
    seed: int,
    work: Work | None,
) -> Gathered:
    """Calibrate; of the data a tenth is held back where the configuration searches."""
    planner = cfg.planner
    kinds = kinds_and_parts(planner, captured, sites)
    data = hold_back(captured, batches, planner.search)
    give_back(sum(weight.nbytes for weight in weights.values()))  # what capturing left behind
    room = _room(captured, sites, weights, data.fit[0], cfg, work)
    gather = _gathering(data.fit, sites, weights, cfg, loss, seed, (room.keeping, work))
    statistics = gather(captured, 0)
    judge = fit = None
    if planner.search != "off":
        remembered = None if work is None else work.remembered
        judged = data.judged(captured, statistics, loss)
        judge = Judge(captured, sites, judged, loss=loss, remembered=remembered)
        fit = _fit(captured, sites, data, statistics, loss, remembered)
    found = Gathered(
        captured,
        sites,
        skipped,
        weights,
        data,
        room,
        gather,
        statistics,
        {},
        judge,
        fit,
        work,
        _kinds={tuple(planner.kinds): kinds},
    )
    found.slices = found.in_metric(statistics, planner)
    return found


def _fit(
    captured: Captured,
    sites: Sequence[Site],
    data: Parts,
    statistics: Statistics,
    loss: Loss | None,
    remembered: Remembered | None,
) -> Calls:
    """Some of the calls that the statistics were taken of, for what a search asks of them."""
    some, tokens = data.some_to_fit(captured, statistics)
    every = Judged(some, 0, len(some), 0)
    return Calls(Judge(captured, sites, every, loss=loss, remembered=remembered), tokens)


def _room(
    captured: Captured,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    batch: object,
    cfg: ShareConfig,
    work: Work | None,
) -> Room:
    """How memory is divided, said before anything is measured."""
    again = cfg.planner.search != "off" and cfg.planner.remeasure > 0
    room = make_room(
        captured,
        sites,
        weights,
        captured.caller(batch),
        limit=cfg.calibration.max_memory,
        gradients=True,
        rounds=2 if again else 1,
        folder=None if work is None else work.path,
    )
    room.say(_LOG, asked=cfg.calibration.max_memory is not None)
    return room


def _gathering(
    batches: Sequence[object],
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    cfg: ShareConfig,
    loss: Loss | None,
    seed: int,
    where: tuple[Keeping, Work | None],
) -> Gather:
    keeping, work = where

    def gather(on: Captured, number: int) -> Statistics:
        folder = keeping.folder and keeping.folder / f"round-{number}"
        if work is not None:
            folder = work.statistics(number)
        return calibrate(
            on,
            batches,
            sites,
            max_tokens=cfg.calibration.max_tokens,
            gradients=True,
            loss=loss,
            labels=cfg.planner.labels,
            seed=seed,
            weights=weights,
            keeping=replace(keeping, folder=folder),
        )

    return gather


__all__ = ["Gather", "Gathered", "gathered"]
