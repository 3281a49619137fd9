"""Calibration: run batches through the observed graph and keep one Gram matrix per input.

The calibrating stage is a graph of its own (the captured one with observers in it); it is thrown
away when the statistics are gathered.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fxshare.base.memory import give_back, resident, trim
from fxshare.base.processes import here
from fxshare.base.progress import stage, track
from fxshare.base.spool import Spooled
from fxshare.calibration.backward import Backward
from fxshare.calibration.blocks import blocks_of, bytes_needed
from fxshare.calibration.gram import Summed, SummedRows
from fxshare.calibration.hooked import HookStage
from fxshare.calibration.keeping import IN_MEMORY, Keeping
from fxshare.calibration.lookups import LookedUpSite
from fxshare.calibration.losses import Labels, Loss, first_ids
from fxshare.calibration.observed import GraphStage
from fxshare.calibration.shards import Seen, batches_within, merged, written
from fxshare.calibration.statistics import Statistics
from fxshare.calibration.stored import Part, read_part
from fxshare.capture import Call, Captured, device_of, quiet
from fxshare.errors import CalibrationError, FxShareWarning
from fxshare.sites.site import Site
from fxshare.sites.tensors import dense_weights
from passes.errors import FxShareError

_LOG = logging.getLogger(__name__)
Rows = tuple[SummedRows, ...]
"""The sums of a site's inputs."""


@stage("calibrate", _LOG)
def calibrate(
    captured: Captured,
    batches: Iterable[object],
    sites: Sequence[Site],
    *,
    max_tokens: int | None = None,
    gradients: bool = False,
    loss: Loss | None = None,
    labels: Labels = "data",
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    keeping: Keeping = IN_MEMORY,
) -> Statistics:
    """Stream ``batches`` through the captured graph and gather the Gram of every site's input.

    With ``gradients`` one backward pass a batch gathers the second moments of the gradients at the
    sites' outputs as well; ``loss(output, batch)`` is summed over tokens and defaults to
    :func:`fxshare.calibration.losses.default_loss`. Weights and their ``.grad`` stay as they are.

    ``weights`` ``(out, in)`` are those whose errors are to be priced, by site, where they are not
    those of what was captured. ``keeping`` says how much is summed up at a time and where the sums
    go; the data is then gone through once for each block of sites, and has to be a list or another
    iterable that can be.

    Of several processes each runs its share of the batches, of which all are given the same
    (:mod:`fxshare.calibration.shards`).

    A batch is a tensor, a tuple, or a mapping (an ``attention_mask`` leaves padding out). Nothing
    of a batch is kept. Products are float32 (float64 for float64 models), sums float64.

    Raises :class:`CalibrationError` for no batches, NaN, or a batch that the model refuses. Warns
    (:class:`FxShareWarning`) when a site saw fewer tokens than it has features.
    """
    start = time.perf_counter()
    total = len(batches) if isinstance(batches, Sized) else None
    if weights is None:
        weights = dense_weights(captured.model, tuple(sites)) if gradients else {}
    parts = _written(keeping.folder)
    done = _covered(parts)
    rest = [site for site in sites if site.name not in done]
    blocks = blocks_of(captured, rest, gradients=gradients, most_bytes=keeping.most_bytes)
    needed = bytes_needed(captured, sites, gradients=gradients)
    told = keeping.told(needed, len(blocks), len(parts))
    _LOG.log(logging.INFO if len(blocks) > 1 or parts else logging.DEBUG, "calibrate: %s", told)
    if iter(batches) is batches and (len(blocks) > 1 or here().size > 1):
        batches = Spooled(batches)
    most = None if max_tokens is None or parts else _counted(captured, sites, batches, max_tokens)
    for number, block in enumerate(blocks):
        folder = keeping.folder and keeping.folder / f"part-{len(parts)}"
        observing = _Observing(
            captured, block, weights, gradients, loss, labels, seed, keeping.offload
        )
        limits = _Limits(max_tokens, most, ()) if not parts else _Limits(None, parts[0].batches, ())
        if not parts:
            limits = replace(limits, counted=tuple(s for b in blocks[1:] for s in b))
        what = "calibrating" if len(blocks) == 1 else f"calibrating {number + 1}/{len(blocks)}"
        part = _gather(observing, track(batches, what, total=total), limits)
        parts.append(written(folder, part, own=keeping.owner is not None) if folder else part)
        if folder:
            del part, observing  # before there is another
            give_back()
    trim()
    return _merged(parts, sites, gradients, time.perf_counter() - start, keeping)


def _counted(
    captured: Captured, sites: Sequence[Site], batches: Iterable[object], max_tokens: int
) -> int | None:
    """How many batches have so many tokens, where several processes have to know beforehand."""
    if here().size == 1:
        return None
    whole = batches if isinstance(batches, Sequence) else Spooled(batches)
    return batches_within(captured, sites, whole, max_tokens)


def stored(folder: Path, sites: Sequence[Site]) -> Statistics | None:
    """The statistics that a calibration wrote into a folder; None where it did not finish."""
    parts = _written(folder)
    if not parts or not {site.name for site in sites} <= _covered(parts):
        return None
    gradients = any(part.gradients for part in parts)
    return _merged(parts, sites, gradients, 0.0, Keeping(folder=folder))


def _written(folder: Path | None) -> list[Part]:
    """The parts that are in a folder, in the order in which they were gathered."""
    parts: list[Part] = []
    while folder is not None and (folder / f"part-{len(parts)}").exists():
        parts.append(read_part(folder / f"part-{len(parts)}"))
    return parts


def _covered(parts: Sequence[Part]) -> set[str]:
    """The sites that parts have the sums of."""
    return {name for part in parts for name in (*part.inputs, *part.lookups)}


@dataclass(frozen=True)
class _Observing:
    """What one pass over the data observes."""

    captured: Captured
    sites: tuple[Site, ...]
    weights: Mapping[str, Tensor]
    gradients: bool
    loss: Loss | None
    labels: Labels
    seed: int
    offload: bool


@dataclass(frozen=True)
class _Limits:
    """When a pass ends: after so many tokens of the busiest linear, those of sites that are only
    ``counted`` included, or after so many batches."""

    max_tokens: int | None
    batches: int | None
    counted: tuple[Site, ...]


def _gather(observing: _Observing, batches: Iterable[object], limits: _Limits) -> Part:
    """One pass over the data."""
    captured, sites, gradients = observing.captured, observing.sites, observing.gradients
    running: GraphStage | HookStage = (
        HookStage(captured.model, sites, observing.weights, gradients=gradients)
        if captured.side_by_side
        else GraphStage(
            captured,
            sites,
            observing.weights,
            gradients=gradients,
            counted=limits.counted,
            offload=observing.offload,
        )
    )
    backward = Backward(
        running, observing.loss, observing.labels, observing.seed, offload=observing.offload
    )
    observe = backward if gradients else lambda call, batch, number: running(call)
    try:
        last, count, starts = _stream(captured, batches, running, observe, limits)
        if gradients:
            backward.complete(last)
        losses = Seen(count, starts, backward.losses, backward.name)
        seen = merged(running, losses, device_of(captured.model))
    finally:
        running.close()
    if seen.batches == 0:
        raise CalibrationError(
            "the calibration data gave no batches (an iterator that was used up before?); give a "
            "list, or an iterator at its start"
        )
    inputs = _by_site(sites, running)
    _check_sums(inputs)
    return Part(
        inputs=inputs,
        batches=seen.batches,
        tokens=max((o.tokens for o in running.counting), default=0),
        gradients=_by_slice(sites, running) if gradients else {},
        lookups=_by_lookup(sites, running),
        unmasked=sum(o.unmasked for o in running.observers.values()),
        loss=seen.loss,
        total_loss=seen.total_loss,
        starts=tuple(sorted(seen.starts)),
    )


def _merged(
    parts: Sequence[Part],
    sites: Sequence[Site],
    gradients: bool,
    seconds: float,
    keeping: Keeping,
) -> Statistics:
    """What all passes gathered."""
    inputs, moments, lookups = _joined(parts, sites)
    first = parts[0]
    tokens, starts = first.tokens, first.starts
    return Statistics(
        inputs,
        first.batches,
        tokens,
        sum(one.nbytes for one in _sums(inputs, moments)),
        seconds,
        _notes(sites, inputs, sum(part.unmasked for part in parts)),
        moments,
        lookups,
        loss=first.loss,
        mean_loss=first.total_loss / max(tokens, 1) if gradients else math.nan,
        starts_with=starts[0] if len(starts) == 1 else None,
        folder=keeping.owner,
    )


def _joined(
    parts: Sequence[Part], sites: Sequence[Site]
) -> tuple[dict[str, Rows], dict[str, tuple[Summed, ...]], dict[str, LookedUpSite]]:
    """The sums of all parts, in the order of the sites."""
    inputs: dict[str, Rows] = {}
    moments: dict[str, tuple[Summed, ...]] = {}
    lookups: dict[str, LookedUpSite] = {}
    for part in parts:
        inputs |= part.inputs
        moments |= part.gradients
        lookups |= part.lookups
    names = [s.name for site in sites for s in site.slices]
    return (
        {site.name: inputs[site.name] for site in sites},
        {name: moments[name] for name in names if name in moments},
        {site.name: lookups[site.name] for site in sites if site.name in lookups},
    )


def _sums(
    inputs: Mapping[str, Rows], moments: Mapping[str, tuple[Summed, ...]]
) -> Iterable[Summed]:
    found: dict[int, Summed] = {}
    for several in (*inputs.values(), *moments.values()):
        found |= {id(one): one for one in several}
    return found.values()


def _stream(
    captured: Captured,
    batches: Iterable[object],
    running: GraphStage | HookStage,
    observe: Callable[[Call, object, int], object],
    limits: _Limits,
) -> tuple[int, int, frozenset[int]]:
    """Run this process' share of the batches until the limits are reached; how many batches
    that were in all and of this one, and the ids that samples started with."""
    last = count = 0
    starts: set[int] = set()
    caller, together = captured.caller, here()
    before = resident()
    for number, batch in enumerate(batches):
        last = number + 1
        if number % together.size == together.rank:
            together.look()
            call = caller(batch)
            _check_finite(call, number)
            _run(observe, call, batch, number)
            count += 1
            starts |= first_ids(call)
            trim(before)  # or the next batch would not find room between what is left of this one
        if last == limits.batches:
            break
        if together.size == 1 and limits.max_tokens is not None:
            tokens = max((o.tokens for o in running.counting), default=0)
            if tokens >= limits.max_tokens:
                break
    return last, count, frozenset(starts)


def _run(
    observe: Callable[[Call, object, int], object], call: Call, batch: object, number: int
) -> None:
    try:
        with quiet():
            observe(call, batch, number)
    except FxShareError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration batch {number} failed in the model: {type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}; check its shapes and token ids"
        ) from error


def _check_finite(call: Call, number: int) -> None:
    for name, value in call.items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.device.type != "meta"
            and not bool(torch.isfinite(value).all())
        ):
            bad = int((~torch.isfinite(value)).sum())
            raise CalibrationError(
                f"calibration batch {number}: input {name!r} has {bad} values that are NaN or "
                "infinite; leave such samples out"
            )


def _check_sums(inputs: Mapping[str, Rows]) -> None:
    for name, parts in inputs.items():
        for part in parts:
            if part.tokens:
                try:
                    part.check_finite()
                except CalibrationError as error:
                    raise CalibrationError(f"the input of {name!r}: {error}") from error


def _by_site(sites: Sequence[Site], running: GraphStage | HookStage) -> dict[str, Rows]:
    inputs: dict[str, Rows] = {}
    for site in sites:
        names = dict.fromkeys(o for call in site.calls for o in running.seen.get(call, ()))
        inputs[site.name] = tuple(running.observers[name].gram for name in names)
    return inputs


def _by_slice(
    sites: Sequence[Site], running: GraphStage | HookStage
) -> dict[str, tuple[Summed, ...]]:
    return {
        s.name: tuple(
            running.taps[tap].grams[s.name]
            for call in site.calls
            for tap in running.tapped.get(call, ())
        )
        for site in sites
        for s in site.slices
    }


def _by_lookup(sites: Sequence[Site], running: GraphStage | HookStage) -> dict[str, LookedUpSite]:
    return {
        site.name: LookedUpSite(
            site.slices[0].name,
            site.in_features,
            tuple(one for name in site.lookups for one in running.looked_up.get(name, ())),
        )
        for site in sites
        if site.lookups
    }


def _notes(
    sites: Sequence[Site],
    inputs: Mapping[str, Rows],
    unmasked: int,
) -> tuple[str, ...]:
    notes = []
    short = [
        (site, count)
        for site in sites
        if site.calls and (count := sum(g.tokens for g in inputs[site.name])) < site.in_features
    ]
    if short:
        site, count = short[0]
        text = (
            f"{len(short)} of {len(sites)} sites saw fewer tokens than they have features: "
            f"{site.name} has {site.in_features} features and saw {count} tokens; directions that "
            "no token took are treated as nearly free. Give more calibration data"
        )
        warnings.warn(text, FxShareWarning, stacklevel=6)
        notes.append(text)
    if unmasked:
        notes.append(
            f"{unmasked} inputs do not have one row a token; the mask was not applied there"
        )
    return tuple(notes)
