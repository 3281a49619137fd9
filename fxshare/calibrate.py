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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fxshare.capture import Captured, bind, device_of, quiet, to_device
from fxshare.capture.call import MASK, Call, completed, holds_tensor, without_labels
from fxshare.capture.guards import ones_if_missing
from fxshare.errors import CalibrationError, FxShareError, FxShareWarning
from fxshare.gram import GramAccumulator
from fxshare.losses import Labels, Loss, default_loss
from fxshare.plans import Site, SliceSpec
from fxshare.progress import track
from fxshare.taps import GradientTap
from passes import ObserveGradients, ObserveInputs, is_linear, observed, run, structure_copy, tapped

_LOG = logging.getLogger("fxshare")


class InputObserver(nn.Module):
    """Adds the rows it sees to a Gram matrix; rows of masked tokens are left out."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gram = GramAccumulator(features)
        self.unmasked = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in ``x`` ``(..., features)``; ``mask`` ``(batch, sequence)`` is 0 at padding."""
        rows = x.numel() // max(x.shape[-1], 1)
        if mask is not None and mask.numel() != rows:
            # not one row a token (pooled outputs, routed experts): nothing says which to leave out
            self.unmasked = True
            mask = None
        self.gram.add(x, None if mask is None else mask.bool())


@dataclass(frozen=True)
class Statistics:
    """What calibration gathered.

    ``inputs`` maps a site's name to the accumulators of its inputs (several when the module is
    called more than once); sites that read the same activation share the same accumulator.
    """

    inputs: Mapping[str, tuple[GramAccumulator, ...]]
    batches: int
    tokens: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    gradients: Mapping[str, tuple[GramAccumulator, ...]] = field(default_factory=dict)
    """Per slice the second moments of its output's gradient, one for each call of its module."""
    loss: str = ""
    """The loss whose gradients they are."""
    mean_loss: float = math.nan
    """That loss per token on the calibration data."""

    def moment(self, slice_name: str, site: str) -> Tensor:
        """``A = E[δ δᵀ]`` ``(out, out)`` float64, δ the summed loss' gradient at one token."""
        parts = self.gradients[slice_name]
        tokens = self.tokens_of(site)
        seen = [part for part in parts if part.tokens]
        if not seen or tokens == 0:
            raise CalibrationError(
                f"slice {slice_name!r} gets no gradient: the loss does not depend on it for this "
                "data; keep its layer dense (planner: {keep_dense: [...]}) or give another loss"
            )
        moments = [part.gram() * (part.tokens / tokens) for part in seen]
        moment = moments[0] if len(moments) == 1 else torch.stack(moments).sum(0)
        if float(moment.diagonal().sum()) <= 0:
            raise CalibrationError(
                f"slice {slice_name!r} gets no gradient: it is zero at every token of the "
                "calibration data; leave it out of the patterns or give another loss"
            )
        return moment

    def mean(self, site: str) -> Tensor:
        """``E[x]`` ``(in,)`` float64 over all inputs of the site."""
        parts = [part for part in self.inputs[site] if part.tokens]
        total = self.tokens_of(site)
        return torch.stack([part.mean() * (part.tokens / total) for part in parts]).sum(0)

    def gram(self, site: str) -> Tensor:
        """``E[x xᵀ]`` ``(in, in)`` float64 over all inputs of the site, weighted by tokens."""
        parts = self.inputs[site]
        total = sum(part.tokens for part in parts)
        if total == 0:
            raise CalibrationError(
                f"{site!r} saw no tokens: it never ran on the calibration data, or every token was "
                "masked; give data that reaches it, or leave it out of the patterns"
            )
        weighted = [part.gram() * (part.tokens / total) for part in parts if part.tokens]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)

    def tokens_of(self, site: str) -> int:
        """Rows that went into the site's Gram."""
        return sum(part.tokens for part in self.inputs[site])

    def key(self, sites: Sequence[str]) -> tuple[int, ...]:
        """Equal for sets of sites that have the same statistics."""
        return tuple(id(part) for site in sites for part in self.inputs[site])


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
    names = tuple(name for site in sites for name in site.calls)
    slices = {name: site.slices for site in sites for name in site.calls} if gradients else {}
    running: _GraphStage | _HookStage = (
        _HookStage(model, names, slices)
        if captured.front_end == "modules"
        else _GraphStage(captured, names, slices)
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
            tokens = max((o.gram.tokens for o in running.observers.values()), default=0)
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
        backward.name,
        backward.total / max(tokens, 1) if gradients else math.nan,
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
    with ``gradients`` one per slice."""
    names = {name for site in sites for name in site.calls}
    gm, _ = run(captured.graph, [ObserveInputs(sites=tuple(names), new_observer=_Width)])
    widths = (m.features for m in gm.children() if isinstance(m, _Width))
    held = sum(GramAccumulator.bytes_needed(width) for width in widths)
    if gradients:
        outputs = (s.out_features for site in sites for s in site.slices)
        held += sum(GramAccumulator.bytes_needed(width) for width in outputs)
    return held


class _Width(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, *_: Tensor) -> None:
        """Sees nothing; only counted."""


class _GraphStage:
    """The captured graph with observers in it."""

    def __init__(
        self,
        captured: Captured,
        names: tuple[str, ...],
        slices: Mapping[str, tuple[SliceSpec, ...]],
    ) -> None:
        nodes = {str(n.target): n.name for n in captured.graph.graph.nodes if n.op == "placeholder"}
        filled = [n.name for n in captured.graph.graph.nodes if n.target is ones_if_missing]
        mask = filled[0] if filled else nodes.get(MASK)
        observe = ObserveInputs(sites=names, new_observer=InputObserver, mask=mask)
        tap = ObserveGradients(
            sites=tuple(slices), new_tap=lambda name: GradientTap(slices[name]), mask=mask
        )
        self.gm, _ = run(captured.graph, [observe, tap])
        _eval(self.gm)
        self.seen = observed(self.gm)
        self.tapped = tapped(self.gm)
        self.taps = {n: m for n, m in self.gm.named_children() if isinstance(m, GradientTap)}
        self.names = set(nodes)
        self.observers = {
            name: m for name, m in self.gm.named_children() if isinstance(m, InputObserver)
        }

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
        names: tuple[str, ...],
        slices: Mapping[str, tuple[SliceSpec, ...]],
    ) -> None:
        self.model = structure_copy(model).eval()
        self.taps = {name: GradientTap(slices[name]) for name in slices}
        self.tapped = {name: (name,) for name in slices}
        self.observers: dict[str, InputObserver] = {}
        self.seen: dict[str, tuple[str, ...]] = {}
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[RemovableHandle] = []
        for name in names:
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
) -> dict[str, tuple[GramAccumulator, ...]]:
    return {
        s.name: tuple(
            running.taps[tap].grams[s.name]
            for call in site.calls
            for tap in running.tapped.get(call, ())
        )
        for site in sites
        for s in site.slices
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
        if (count := sum(g.tokens for g in inputs[site.name])) < site.in_features
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
