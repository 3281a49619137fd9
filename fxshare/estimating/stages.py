"""Every stage of a compilation, of a model that was counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fxshare.base.memory import free, resident, shown
from fxshare.base.placement import device_of, dtype_of, multiplies
from fxshare.calibration.activations import Activations
from fxshare.calibration.room import Divided, Space, divide, work_bytes
from fxshare.config import ShareConfig
from fxshare.cost_model.pace import NOTHING, Amount, Origin, Pace
from fxshare.estimating import pricing, searching
from fxshare.estimating.calibrating import (
    Bytes,
    backward,
    forward,
    loss,
    statistics_bytes,
    sums,
)
from fxshare.estimating.counted import Counted
from fxshare.estimating.pricing import Candidate, Candidates, candidates
from fxshare.estimating.searching import Searched, Subject
from fxshare.estimating.sharing import sharing
from fxshare.sites.site import Site

_CAPTURE_TOKENS = 1000
"""Of all calls by which a capture compares its graph with the model; the example is cut for them.
Gradients count three times."""
_CAPTURE_PASSES = 20
"""How many passes these are, which make float32 weights of slow half precision each."""
_VERIFY_PASSES = 3
_PER_SLICE = 1000
"""Calls that do next to nothing, by slice, of capture and of rewriting each."""
_DISK = 5e8
"""Bytes a second, of disks that are not slow."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage will take; stages inside of it apart."""

    name: str
    seconds: float
    flops: float = 0.0


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: statistics and activations that do not fit into memory while it runs (in the
    work folder, or the system's place for temporary files), decompositions in a work folder, and
    the saved result."""

    scratch: int
    work: int
    output: int


@dataclass(frozen=True)
class Estimate:
    """What compiling a model takes, stage by stage.

    ``memory`` is the peak of the process, ``limit`` what it was divided from, and ``least`` what it
    takes at least, with many passes over the data: above the limit the model does not ``fit``, and
    figures are those of a machine on which one pass does. ``passes`` are those of one round of
    statistics.
    """

    mode: str
    parameters: int
    sites: int
    tokens: int
    candidates: int
    stages: tuple[StageEstimate, ...]
    memory: int
    limit: int
    least: int
    passes: int
    disk: Disk
    device: str
    origin: Origin

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(one.seconds for one in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the limit is enough."""
        return self.limit >= self.least

    def told(self) -> str:
        """The whole in a line."""
        rates = "" if self.origin == "measured" else f", rates {self.origin}"
        return f"estimated: about {_rounded(self.seconds)} s, {shown(self.memory)}{rates}"

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return {**asdict(self), "seconds": self.seconds, "fits": self.fits}


@dataclass(frozen=True)
class Data:
    """How much data there is: batches of so many tokens."""

    batches: int
    tokens: int


def estimate_of(
    model: nn.Module,
    cfg: ShareConfig,
    sites: Sequence[Site],
    counted: Counted,
    data: Data,
    pace: Pace,
    *,
    work: bool = False,
) -> Estimate:
    """What the stages take of a model as it was counted, matched under a configuration."""
    made = _Estimating(model, cfg, tuple(sites), counted, data, pace, work)
    return made.estimate()


@dataclass(frozen=True)
class _Estimating:
    model: nn.Module
    cfg: ShareConfig
    sites: tuple[Site, ...]
    counted: Counted
    data: Data
    pace: Pace
    work: bool

    def estimate(self) -> Estimate:
        needed = statistics_bytes(self.counted, self.sites, self._dtype, gradients=self._planned)
        divided = self._divided(needed)
        parts = candidates(
            self.sites,
            self.counted.reads,
            strategy=self.cfg.planner.strategy,
            merged=self.cfg.planner.search != "off" and not self.cfg.planner.may_share,
        )
        passes = 1
        if not divided.fits and divided.block < needed.all:
            passes = max(math.ceil(needed.all / max(divided.block, needed.block, 1)), 1)
        stages = list(self._stages(parts, divided, needed, passes))
        return Estimate(
            mode=self.cfg.mode,
            parameters=sum(p.numel() for p in self.model.parameters()),
            sites=len(self.sites),
            tokens=self.data.tokens,
            candidates=len(parts) if self._planned else 0,
            stages=tuple(StageEstimate(n, a.seconds, a.flops) for n, a in stages),
            memory=self._memory(divided, needed, parts),
            limit=self._limit(divided.space.resident),
            least=divided.least,
            passes=passes,
            disk=self._disk(divided, needed, parts),
            device=self.pace.device if self.pace.name == self.pace.device else self.pace.name,
            origin=self.pace.origin,
        )

    @property
    def _planned(self) -> bool:
        return self.cfg.mode == "planned"

    @property
    def _rounds(self) -> int:
        planner = self.cfg.planner
        return 1 + (planner.remeasure if self._planned and planner.search != "off" else 0)

    @property
    def _spectra(self) -> int:
        """How many spectra there are: of every round, by the loss and by activation error."""
        return self._rounds * (1 if self.cfg.planner.search == "off" else 2)

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_of(self.model)

    @property
    def _wide(self) -> bool:
        """Whether statistics and losses are taken in float32 of a model in half precision."""
        on_cpu = self.pace.device == "cpu"
        return on_cpu and not multiplies(torch.device("cpu"), self._dtype)

    @property
    def _measuring(self) -> tuple[Pace, int]:
        """The pace of calibration and of judging, and the bytes of a number there."""
        if self._wide:
            return replace(self.pace, model=self.pace.single), torch.float32.itemsize
        return self.pace, self._dtype.itemsize

    @property
    def _matched(self) -> int:
        return sum(site.weights for site in self.sites) * self._dtype.itemsize

    @property
    def _bytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())
        )

    @property
    def _keep(self) -> float:
        """The share of the matched numbers that a plan keeps, as far as the configuration tells."""
        budget, cfg = self.cfg.budget, self.cfg
        if budget is not None:
            share = budget.params_kept or budget.bytes_kept or budget.flops_kept
            if budget.max_bytes is not None:
                rest = self._bytes - self._matched
                share = (budget.max_bytes - rest) / max(self._matched, 1)
            return min(max(share or 0.9, 0.01), 1.0)
        return cfg.compression_rate if cfg.compression_rate is not None else 1.0

    def _divided(self, needed: Bytes) -> Divided:
        """Memory as it is divided before anything runs; where that is too little, what is enough
        for one pass over the data."""
        on_meta = device_of(self.model).type == "meta"
        used = resident() + (self._bytes if on_meta else 0)
        counted = self.counted
        # what was counted is in the model's own dtype
        times = torch.float32.itemsize // self._dtype.itemsize if self._wide else 1
        taken = counted.alive or Activations(counted.most, 0)
        alive = Activations(*(times * one for one in taken))
        space = Space(
            resident=used,
            statistics=needed.all if self._calibrates else 0,
            rounds=self._rounds,
            block=lambda: needed.block,
            work=work_bytes(self.sites),
            candidate=self._matched if self._planned else 0,
            at_most=times * counted.most,
            activations=lambda: alive,
            offloads=self._planned,
        )
        limit, folder = self._limit(used), "work" if self.work else None
        asked = self.cfg.calibration.max_memory is not None
        found = divide(space, limit, asked=asked, folder=folder)
        if found.limit < found.least:
            # at the least there would be a pass for every block: what one pass takes says more
            return divide(space, found.least + needed.all, asked=True, folder=folder)
        return found

    def _limit(self, used: int) -> int:
        """What was asked for, or what is in use and half of what is free then."""
        if self.cfg.calibration.max_memory is not None:
            return self.cfg.calibration.max_memory
        on_meta = device_of(self.model).type == "meta"
        return used + max(free() - (self._bytes if on_meta else 0), 0) // 2

    @property
    def _calibrates(self) -> bool:
        return self.cfg.mode != "exact" and self.data.batches > 0

    def _stages(
        self, parts: Candidates, divided: Divided, needed: Bytes, passes: int
    ) -> Iterator[tuple[str, Amount]]:
        pace, itemsize = self._measuring
        once = forward(pace, self.counted, itemsize) * (_CAPTURE_TOKENS / max(self.counted.rows, 1))
        if self._wide:
            once += pace.moved(_CAPTURE_PASSES * 3 * self._bytes, 1 << 30)
        python = self.pace.calls(_PER_SLICE * sum(len(site.slices) for site in self.sites))
        yield "capture", once + python * 2
        if self._planned and self.data.batches:
            yield from self._planning(parts, divided, needed, passes)
        elif self.cfg.mode == "sharing":
            if self.data.batches:
                yield "calibrate", self._calibrated(self.data.batches, False) * passes
            singular = self._singular(self.data.batches)
            yield (
                "factorise",
                sharing(self.pace, self.cfg, self.sites, self.counted.reads, singular, self._keep),
            )
        yield "rewrite", python
        yield "verify", self._verified()

    def _planning(
        self, parts: Candidates, divided: Divided, needed: Bytes, passes: int
    ) -> Iterator[tuple[str, Amount]]:
        searched = Searched.of(self.cfg, parts, self.data.batches)
        held = 0 if self.cfg.planner.search == "off" else max(self.data.batches // 10, 1)
        fit = max(self.data.batches - held, 1)
        written = NOTHING if divided.fits else Amount(4 * needed.all / _DISK)
        pace, itemsize = self._measuring
        subject = Subject(
            pace,
            self.counted,
            self.sites,
            itemsize,
            self._keep,
            divided.kept,
            self._singular(fit),
            self.work,
        )
        yield "calibrate", (self._calibrated(fit, True) * passes + written) * self._rounds
        yield "moments", searching.moments(subject, searched)
        prices = searching.others(subject, searched, self.cfg.planner.kinds)
        yield "spectra", searching.spectra(subject, searched) + prices
        yield "solve", searching.solved(subject, searched)
        yield "factorise groups", searching.factorised(subject, searched)
        yield "refit", searching.refitted(subject, searched)
        yield "multiply out", searching.multiplied_out(subject, searched.copies)
        yield "judge", searching.judged(subject, searched.judged)
        if searched.copies:
            yield "search", searching.copied(subject, searched)
            yield "slope", searching.slope(subject, fit)
        if self.cfg.planner.search == "refined":
            yield "refine plans", searching.refined(subject, self.data.batches)
        yield "factorise", searching.realised(subject, parts.alone)

    def _calibrated(self, batches: int, gradients: bool) -> Amount:
        """So many batches, once."""
        pace, itemsize = self._measuring
        found = forward(pace, self.counted, itemsize)
        if gradients:
            found += backward(pace, self.counted, itemsize)
            found += loss(pace, self.counted, backward=True)
        return (found + sums(pace, self.counted, self.sites, gradients=gradients)) * batches

    def _singular(self, batches: int) -> frozenset[int]:
        """The widths of inputs whose moments are singular: behind a LayerNorm, whose outputs lie
        in a plane, and where tokens are few."""
        normed = {
            m.normalized_shape[-1] for m in self.model.modules() if isinstance(m, nn.LayerNorm)
        }
        tokens = batches * self.counted.rows
        return frozenset(normed | {x.in_features for x in self.sites if x.in_features > tokens})

    def _verified(self) -> Amount:
        # of half precision too it is run in float32
        pace = replace(self.pace, model=self.pace.single) if self._dtype.itemsize < 4 else self.pace
        found = forward(pace, self.counted, max(self._dtype.itemsize, 4)) * _VERIFY_PASSES
        if self.cfg.mode == "exact":
            return found
        for site in self.sites:
            for s in site.slices:
                rank = pricing.rank_of(site.in_features, s.out_features, self._keep)
                found += self.pace.product(s.out_features, rank, site.in_features)
                found += self.pace.moved(8 * 4 * s.out_features * site.in_features)
        return found

    def _memory(self, divided: Divided, needed: Bytes, parts: Candidates) -> int:
        """The peak: what is in use, and what is held beside it at once."""
        space = divided.space
        held = self._rounds * needed.all if self._calibrates else 0
        kept = 0
        if self._planned:
            each = sum(16 * one[0].inputs ** 2 + 24 * _numbers(one) for one in parts.alone)
            kept = min(divided.kept, 2 * pricing.decomposition_bytes(parts.alone) + each)
        if divided.fits:
            at_once = held + kept
        else:  # what planning keeps is given back before statistics are gathered
            at_once = max(min(needed.all, divided.block) - space.work, kept)
        at_once += space.work + space.candidate
        return space.resident + divided.activations + max(at_once, 0)

    def _disk(self, divided: Divided, needed: Bytes, parts: Candidates) -> Disk:
        statistics = self._rounds * needed.all if self._calibrates else 0
        scratch = 0 if divided.fits or self.work else statistics
        if divided.offload:
            alive = self.counted.alive
            scratch += self.counted.most if alive is None else alive.alive
        if self._planned:
            scratch += self._spectra * pricing.filed_bytes(parts.alone, self._dtype)
        written = 0
        if self.work:
            written = statistics
            if self._planned:
                written += pricing.written_bytes(parts.alone, self._dtype, self._spectra)
        output = self._bytes - self._matched + int(self._keep * self._matched)
        return Disk(scratch, written, output)


def _numbers(part: Candidate) -> int:
    return part[0].inputs * sum(one.outputs for one in part)


def _rounded(seconds: float) -> str:
    """Two digits: no estimate has more."""
    if seconds < 10:
        return f"{seconds:.1f}"
    digits = max(math.floor(math.log10(seconds)) - 1, 0)
    return f"{round(seconds, -digits):,.0f}"


__all__ = ["Data", "Disk", "Estimate", "StageEstimate", "estimate_of"]
