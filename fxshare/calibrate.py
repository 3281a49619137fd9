"""Calibration: run batches through the observed graph and keep one Gram matrix per input.

The calibrating stage is a graph of its own (the captured one with observers in it); it is thrown
away when the statistics are gathered.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fxshare.capture import Captured, bind, device_of, quiet, to_device
from fxshare.capture.call import MASK, Call, completed, holds_tensor, without_labels
from fxshare.capture.guards import ones_if_missing
from fxshare.errors import CalibrationError, FxShareError, FxShareWarning
from fxshare.gram import DiagonalAccumulator, GramAccumulator
from fxshare.lookup_statistics import LookedUpSite, LookupStatistics, RowCounter
from fxshare.losses import Labels, Loss, default_loss
from fxshare.plans import Site, SliceSpec
from fxshare.progress import track
from fxshare.statistics import Statistics
from fxshare.taps import GradientTap, Moment, is_diagonal
from passes import (
    ObserveGradients,
    ObserveInputs,
    ObserveLookups,
    Pass,
    is_linear,
    observed,
    observed_lookups,
    run,
    structure_copy,
    tapped,
)

_LOG = logging.getLogger("fxshare")


class InputObserver(nn.Module):
    """Adds the rows it sees to a Gram matrix; rows of masked tokens are left out."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gram = GramAccumulator(features)
        self.unmasked = False

    @property
    def tokens(self) -> int:
        """Rows that went into the Gram."""
        return self.gram.tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in ``x`` ``(..., features)``; ``mask`` ``(batch, sequence)`` is 0 at padding."""
        rows = x.numel() // max(x.shape[-1], 1)
        if mask is not None and mask.numel() != rows:
            # not one row a token (pooled outputs, routed experts): nothing says which to leave out
            self.unmasked = True
            mask = None
        self.gram.add(x, None if mask is None else mask.bool())


def calibrate(
    model: nn.Module,
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
) -> Statistics:
    """Stream ``batches`` through the captured graph and gather the Gram of every site's input.

    With ``gradients`` one backward pass a batch gathers the second moments of the gradients at the
    sites' outputs as well; ``loss(output, batch)`` is summed over tokens and defaults to
    :func:`fxshare.losses.default_loss`. Weights and their ``.grad`` stay as they are.

    A batch is a tensor, a tuple, or a mapping (an ``attention_mask`` leaves padding out). Nothing
    of a batch is kept. Products are float32 (float64 for float64 models), sums float64.

    Raises :class:`CalibrationError` for no batches, NaN, or a batch that the model refuses. Warns
    (:class:`FxShareWarning`) when a site saw fewer tokens than it has features.
    """
    start = time.perf_counter()
    running: _GraphStage | _HookStage = (
        _HookStage(model, sites, gradients=gradients)
        if captured.front_end == "modules"
        else _GraphStage(captured, sites, gradients=gradients)
    )
    backward = _Backward(running, loss, labels, seed)
    needed = bytes_needed(captured, sites, gradients=gradients)
    _LOG.info("statistics of %d sites will hold at most %s bytes", len(sites), f"{needed:,}")
    count = tokens = 0
    device = device_of(model)
    keep = captured.shapes.base if captured.shapes else ()
    try:
        for batch in track(batches, "calibrating", total=total):
            given = without_labels(model, bind(model, batch), keep)
            call = to_device(completed(model, given), device)
            _check_finite(call, count)
            try:
                with quiet():
                    if gradients:
                        backward(call, batch)
                    else:
                        running(call)
            except FxShareError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"calibration batch {count} failed in the model: {type(error).__name__}: "
                    f"{next(iter(str(error).splitlines()), '')}; check its shapes and token ids"
                ) from error
            count += 1
            tokens = max((o.tokens for o in running.counting), default=0)
            if max_tokens is not None and tokens >= max_tokens:
                break
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
    )


class _Backward:
    """Runs a batch forward and backward; only the taps ask for gradients."""

    def __init__(
        self, running: _GraphStage | _HookStage, loss: Loss | None, labels: Labels, seed: int
    ) -> None:
        self.running = running
        self.loss = loss
        self.labels: Labels = labels
        self.generator = torch.Generator().manual_seed(seed)
        self.name = ""
        self.total = 0.0

    def __call__(self, call: Call, batch: object) -> None:
        with torch.enable_grad():
            output = self.running(call)
            if self.loss is None:
                value, self.name = default_loss(
                    output, call, labels=self.labels, generator=self.generator
                )
            else:
                value, self.name = self.loss(output, batch), "the loss given"
            _check_loss(value)
            probes = [tap.probe for tap in self.running.taps.values()]
            torch.autograd.grad(value, probes, allow_unused=True)
        self.total += float(value.detach())
        for name, tap in self.running.taps.items():
            if not tap.finite:
                raise CalibrationError(
                    f"the gradient at {tap.slices[0].name!r} ({name}) has NaN or infinite values; "
                    "leave such batches out, or calibrate in float32"
                )


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise CalibrationError(
            "loss: expected a scalar tensor that depends on the model's output, found "
            f"{type(value).__name__} {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
        )
    if not bool(torch.isfinite(value)):
        raise CalibrationError(f"the calibration loss is {float(value.detach())}; check the data")


def bytes_needed(captured: Captured, sites: Sequence[Site], *, gradients: bool = False) -> int:
    """Bytes that :func:`calibrate` will hold: one half Gram in float64 per distinct input, and
    with ``gradients`` one per slice; diagonals and counts where rows are looked up."""
    names = {name for site in sites for name in site.calls}
    gm, _ = run(captured.graph, [ObserveInputs(sites=tuple(names), new_observer=_Width)])
    widths = (m.features for m in gm.children() if isinstance(m, _Width))
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
    return GramAccumulator.bytes_needed(s.out_features)


class _Width(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, *_: Tensor) -> None:
        """Sees nothing; only counted."""


_ROWS = "rows"


def _lookup_tap(width: int) -> GradientTap:
    return GradientTap([SliceSpec(name=_ROWS, start=0, stop=width)])


def _tap_of(site: Site) -> GradientTap:
    diagonal = {s.name for s in site.slices if is_diagonal(site, s)}
    return GradientTap(site.slices, diagonal)


class _GraphStage:
    """The captured graph with observers in it."""

    def __init__(self, captured: Captured, sites: Sequence[Site], *, gradients: bool) -> None:
        called = {name: site for site in sites for name in site.calls}
        looked_up = tuple(name for site in sites for name in site.lookups)
        nodes = {str(n.target): n.name for n in captured.graph.graph.nodes if n.op == "placeholder"}
        filled = [n.name for n in captured.graph.graph.nodes if n.target is ones_if_missing]
        mask = filled[0] if filled else nodes.get(MASK)
        stages: list[Pass] = [
            ObserveInputs(sites=tuple(called), new_observer=InputObserver, mask=mask),
            ObserveLookups(
                sites=looked_up,
                new_counter=RowCounter,
                new_tap=_lookup_tap if gradients else None,
                mask=mask,
            ),
        ]
        if gradients:
            tap = ObserveGradients(
                sites=tuple(called), new_tap=lambda name: _tap_of(called[name]), mask=mask
            )
            stages.append(tap)
        self.gm, _ = run(captured.graph, stages)
        _eval(self.gm)
        self.seen = observed(self.gm)
        self.tapped = tapped(self.gm)
        self.taps = {n: m for n, m in self.gm.named_children() if isinstance(m, GradientTap)}
        self.names = set(nodes)
        self.observers = {
            name: m for name, m in self.gm.named_children() if isinstance(m, InputObserver)
        }
        counters = [m for m in self.gm.children() if isinstance(m, RowCounter)]
        self.counting: list[InputObserver | RowCounter] = [*self.observers.values(), *counters]
        self.looked_up = {
            name: tuple(self._lookup(*both) for both in found)
            for name, found in observed_lookups(self.gm).items()
        }

    def _lookup(self, counter: str, tap: str | None) -> LookupStatistics:
        counted = self.gm.get_submodule(counter)
        assert isinstance(counted, RowCounter)
        if tap is None:
            return LookupStatistics(counted, None)
        gradient = self.taps[tap].grams[_ROWS]
        assert isinstance(gradient, GramAccumulator)
        return LookupStatistics(counted, gradient)

    def __call__(self, call: Call) -> Any:
        given = {k: v for k, v in call.items() if holds_tensor(v)}
        unknown = sorted(set(given) - self.names)
        if unknown:
            raise CalibrationError(
                f"a calibration batch has {unknown[0]!r}, which the captured call had not; give "
                "batches of one form, or example=... with every argument"
            )
        return self.gm(**given)

    def close(self) -> None:
        """Nothing to take down: the observed graph is our own."""


class _HookStage:
    """A copy of the model with hooks on its linears; for capture at module granularity."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        gradients: bool,
    ) -> None:
        self.model = structure_copy(model).eval()
        called = {name: site for site in sites for name in site.calls}
        self.taps = {name: _tap_of(site) for name, site in called.items()} if gradients else {}
        self.tapped = {name: (name,) for name in self.taps}
        # at this granularity embeddings are no sites
        self.looked_up: dict[str, tuple[LookupStatistics, ...]] = {}
        self.observers: dict[str, InputObserver] = {}
        self.seen: dict[str, tuple[str, ...]] = {}
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[RemovableHandle] = []
        for name in called:
            module = self.model.get_submodule(name)
            if is_linear(module):
                hook = self._hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                if name in self.taps:
                    self._handles.append(module.register_forward_hook(self._tap(name)))

    def _tap(self, name: str) -> Any:
        def tap(module: nn.Module, args: Any, y: Tensor) -> Any:
            return self.taps[name](y, self._mask)

        return tap

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # q, k and v are handed the same tensor object, one after the other
            if self._last is not None and self._last[0] is x:
                observer = self._last[1]
                if observer == self.seen.get(name, (observer,))[0]:
                    self.seen[name] = (observer,)
                    return
            observer = self.seen.get(name, (name,))[0]
            if observer not in self.observers:
                self.observers[observer] = InputObserver(x.shape[-1])
            self.seen[name] = (observer,)
            self._last = (x, observer)
            self.observers[observer](x, self._mask)

        return look

    @property
    def counting(self) -> list[InputObserver | RowCounter]:
        """What counts tokens."""
        return list(self.observers.values())

    def __call__(self, call: Call) -> Any:
        mask = call.get(MASK)
        self._mask = mask if isinstance(mask, Tensor) else None
        try:
            return self.model(**call)
        finally:
            self._last = self._mask = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _eval(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        module.training = False


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
    sites: Sequence[Site], running: _GraphStage | _HookStage
) -> dict[str, tuple[GramAccumulator, ...]]:
    inputs = {}
    for site in sites:
        names = dict.fromkeys(o for call in site.calls for o in running.seen.get(call, ()))
        inputs[site.name] = tuple(running.observers[name].gram for name in names)
    return inputs


def _by_slice(
    sites: Sequence[Site], running: _GraphStage | _HookStage
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


def _by_lookup(sites: Sequence[Site], running: _GraphStage | _HookStage) -> dict[str, LookedUpSite]:
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
    running: _GraphStage | _HookStage,
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
        warnings.warn(text, FxShareWarning, stacklevel=4)
        notes.append(text)
    unmasked = [name for name, o in running.observers.items() if o.unmasked]
    if unmasked:
        notes.append(
            f"{len(unmasked)} inputs do not have one row a token; the mask was not applied there"
        )
    return tuple(notes)
