"""Calibration: run batches through the observed graph and keep one Gram matrix per input.

The calibrating stage is a graph of its own (the captured one with observers in it); it is thrown
away when the statistics are gathered.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxshare.base.progress import stage, track
from fxshare.calibration.backward import Backward
from fxshare.calibration.gradients import Moment, is_diagonal, is_projected
from fxshare.calibration.gram import DiagonalAccumulator, GramAccumulator
from fxshare.calibration.hooked import HookStage
from fxshare.calibration.lookups import LookedUpSite
from fxshare.calibration.losses import Labels, Loss, first_ids
from fxshare.calibration.observed import GraphStage, Width
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Call, Captured, quiet
from fxshare.errors import CalibrationError, FxShareWarning
from fxshare.sites.site import Site, SliceSpec
from fxshare.sites.tensors import dense_weights
from passes import ObserveInputs, run
from passes.errors import FxShareError

_LOG = logging.getLogger(__name__)


@stage("calibrate", _LOG)
def calibrate(
    captured: Captured,
    batches: Iterable[object],
    sites: Sequence[Site],
    *,
    max_tokens: int | None = None,
    total: int | None = None,
    gradients: bool = False,
    loss: Loss | None = None,
    labels: Labels = "data",
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Stream ``batches`` through the captured graph and gather the Gram of every site's input.

    With ``gradients`` one backward pass a batch gathers the second moments of the gradients at the
    sites' outputs as well; ``loss(output, batch)`` is summed over tokens and defaults to
    :func:`fxshare.calibration.losses.default_loss`. Weights and their ``.grad`` stay as they are.

    ``weights`` ``(out, in)`` are those whose errors are to be priced, by site, where they are not
    those of what was captured.

    A batch is a tensor, a tuple, or a mapping (an ``attention_mask`` leaves padding out). Nothing
    of a batch is kept. Products are float32 (float64 for float64 models), sums float64.

    Raises :class:`CalibrationError` for no batches, NaN, or a batch that the model refuses. Warns
    (:class:`FxShareWarning`) when a site saw fewer tokens than it has features.
    """
    start = time.perf_counter()
    if weights is None:
        weights = dense_weights(captured.model, tuple(sites)) if gradients else {}
    running: GraphStage | HookStage = (
        HookStage(captured.model, sites, weights, gradients=gradients)
        if captured.side_by_side
        else GraphStage(captured, sites, weights, gradients=gradients)
    )
    backward = Backward(running, loss, labels, seed)
    needed = bytes_needed(captured, sites, gradients=gradients)
    _LOG.debug("statistics of %d sites will hold at most %s bytes", len(sites), f"{needed:,}")
    tracked = track(batches, "calibrating", total=total)
    observe = backward if gradients else lambda call, batch: running(call)
    try:
        count, tokens, starts = _stream(captured, tracked, running, observe, max_tokens)
    finally:
        running.close()
    if count == 0:
        raise CalibrationError(
            "the calibration data gave no batches (an iterator that was used up before?); give a "
            "list, or an iterator at its start"
        )
    inputs = _by_site(sites, running)
    _check_sums(inputs)
    accumulators = {id(g): g for parts in inputs.values() for g in parts}
    notes = _notes(sites, inputs, running)
    held = sum(g.nbytes for g in accumulators.values())
    moments = _by_slice(sites, running) if gradients else {}
    held += sum(g.nbytes for parts in moments.values() for g in parts)
    return Statistics(
        inputs,
        count,
        tokens,
        held,
        time.perf_counter() - start,
        notes,
        moments,
        _by_lookup(sites, running),
        loss=backward.name,
        mean_loss=backward.total / max(tokens, 1) if gradients else math.nan,
        starts_with=next(iter(starts)) if len(starts) == 1 else None,
    )


def _stream(
    captured: Captured,
    batches: Iterable[object],
    running: GraphStage | HookStage,
    observe: Callable[[Call, object], object],
    max_tokens: int | None,
) -> tuple[int, int, set[int]]:
    """Run batches until ``max_tokens`` were seen; how many batches and tokens that were, and the
    ids that samples started with."""
    count = tokens = 0
    starts: set[int] = set()
    caller = captured.caller
    for batch in batches:
        call = caller(batch)
        _check_finite(call, count)
        try:
            with quiet():
                observe(call, batch)
        except FxShareError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"calibration batch {count} failed in the model: {type(error).__name__}: "
                f"{next(iter(str(error).splitlines()), '')}; check its shapes and token ids"
            ) from error
        count += 1
        starts |= first_ids(call)
        tokens = max((o.tokens for o in running.counting), default=0)
        if max_tokens is not None and tokens >= max_tokens:
            break
    return count, tokens, starts


def bytes_needed(captured: Captured, sites: Sequence[Site], *, gradients: bool = False) -> int:
    """Bytes that :func:`calibrate` will hold: one half Gram in float64 per distinct input, and
    with ``gradients`` one per slice; diagonals and counts where rows are looked up."""
    names = {name for site in sites for name in site.calls}
    gm, _ = run(captured.graph, [ObserveInputs(sites=tuple(names), new_observer=Width)])
    widths = (m.features for m in gm.children() if isinstance(m, Width))
    held = sum(GramAccumulator.bytes_needed(width) for width in widths)
    for site in sites:
        held += 8 * site.out_features * len(site.lookups)
        if gradients:
            held += GramAccumulator.bytes_needed(site.in_features) * len(site.lookups)
            held += sum(_moment_bytes(site, s) for s in site.slices if site.calls)
    return held


def _moment_bytes(site: Site, s: SliceSpec) -> int:
    if is_diagonal(site, s):
        return DiagonalAccumulator(s.out_features).nbytes
    if is_projected(site, s):
        return GramAccumulator.bytes_needed(site.in_features)
    return GramAccumulator.bytes_needed(s.out_features)


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


def _check_sums(inputs: Mapping[str, tuple[GramAccumulator, ...]]) -> None:
    for name, parts in inputs.items():
        for part in parts:
            if part.tokens:
                try:
                    part.check_finite()
                except CalibrationError as error:
                    raise CalibrationError(f"the input of {name!r}: {error}") from error


def _by_site(
    sites: Sequence[Site], running: GraphStage | HookStage
) -> dict[str, tuple[GramAccumulator, ...]]:
    inputs = {}
    for site in sites:
        names = dict.fromkeys(o for call in site.calls for o in running.seen.get(call, ()))
        inputs[site.name] = tuple(running.observers[name].gram for name in names)
    return inputs


def _by_slice(
    sites: Sequence[Site], running: GraphStage | HookStage
) -> dict[str, tuple[Moment, ...]]:
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
    inputs: Mapping[str, tuple[GramAccumulator, ...]],
    running: GraphStage | HookStage,
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
        warnings.warn(text, FxShareWarning, stacklevel=5)
        notes.append(text)
    unmasked = [name for name, o in running.observers.items() if o.unmasked]
    if unmasked:
        notes.append(
            f"{len(unmasked)} inputs do not have one row a token; the mask was not applied there"
        )
    return tuple(notes)
