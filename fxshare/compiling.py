"""``fxshare.compile`` and ``fxshare.plan``: the stages, one after the other."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxshare.calibrate import Statistics, calibrate
from fxshare.capture import Captured, Mode, capture, device_of, dtype_of
from fxshare.capture.modules_front_end import put_back
from fxshare.config import ConfigSource, ShareConfig, load_config
from fxshare.errors import CalibrationError, ConfigError, FactoriseError, PlanError
from fxshare.factorise import Whitening, factorise, identity_whitening, whiten
from fxshare.gram import pooled_gram
from fxshare.matching import Matching, dense_weights, match
from fxshare.planning import make_plan
from fxshare.plans import Plan, Site, Skipped
from fxshare.progress import track
from fxshare.record import Record, ShareModule
from fxshare.report import Report, group_reports
from fxshare.source import Source
from fxshare.verifying import relative_error, verify
from passes import (
    Applied,
    Pass,
    Rows,
    SharedGroup,
    SplitSite,
    default_passes,
    linear_calls,
    run,
    structure_copy,
)


def compile(
    model: nn.Module,
    cfg: ConfigSource,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    plan: Plan | None = None,
    capture: Mode | None = None,
    passes: Sequence[Pass] = (),
    copy: bool = False,
    check: bool = True,
) -> Any:
    """Rewrite a model under a configuration; the model itself is never touched.

    Parameters
    ----------
    model
        Any ``nn.Module``. Parameters that no pattern matches are shared with the result.
    cfg
        A :class:`ShareConfig`, a mapping, a path to YAML, or a list of these (later ones win).
    calibration
        Batches: tensors, tuples, or mappings with an optional ``attention_mask``. Streamed once.
        Without it the sharing mode is a plain SVD of the weights.
    example
        One batch to capture with; the first calibration batch where it is not given. Give one with
        labels if the result is to return a loss.
    plan
        A plan to realise instead of making one (:func:`fxshare.plan`, or a file edited by hand).
    capture
        Which front end; the configuration's where None.
    passes
        Passes of your own, after those named in the configuration.
    copy
        Clone the parameters that are not rewritten, so that training the result leaves the model
        alone.
    check
        Verify the result on small random inputs before handing it out.

    Returns
    -------
    A :class:`ShareModule` (a ``torch.fx.GraphModule``) with the signature of ``model.forward``; for
    capture at module granularity a copy of the model's own class. Either has ``.fxshare``.

    Raises
    ------
    FxShareError
        One of its kinds, naming what was expected, what was found, and the way out.
    """
    start = time.perf_counter()
    stages = _prepare(model, load_config(cfg), calibration, example, capture)
    cfg = stages.cfg
    own = (*_named_passes(cfg), *passes)
    if plan is None:
        plan = make_plan(cfg, stages.sites, stages.skipped)
    else:
        _check_plan(plan, stages.sites)
    statistics = stages.calibrate() if plan.groups else None
    weights = dense_weights(model, plan.sites)
    factors = _factorise(plan, weights, statistics, cfg)
    rewritten, applied = rewrite(stages.captured.graph, plan, factors.groups, cfg.fuse, own)
    result = assemble(model, stages.captured, rewritten, plan, copy=copy)
    report = Report(
        model=type(model).__name__,
        mode=plan.mode,
        front_end=stages.captured.front_end,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        groups=group_reports(
            plan,
            dtype_of(model).itemsize,
            errors=factors.weighted_errors,
            floored=factors.floored,
            seconds=factors.seconds,
        ),
        sites=len(plan.sites),
        skipped=plan.skipped,
        parameters_before=_count(model),
        parameters_after=_count(result),
        calibration=None if statistics is None else _describe(statistics),
        passes=tuple({"name": a.name, "rewrites": a.rewrites, "exact": a.exact} for a in applied),
        notes=(*stages.captured.notes, *(statistics.notes if statistics else ())),
        seconds={
            "capture": stages.captured.seconds,
            "calibrate": statistics.seconds if statistics else 0.0,
            "factorise": sum(factors.seconds.values()),
            "rewrite": sum(a.seconds for a in applied),
            "total": time.perf_counter() - start,
        },
    )
    record = Record(
        config=cfg,
        plan=plan,
        report=report,
        front_end=stages.captured.front_end,
        source=Source.of(model),
        relaxed=stages.captured.relaxed,
        slice_errors=factors.slice_errors,
        inputs=Record.specs(stages.captured.shapes),
    )
    attach(result, record)
    # a pass of the user's own may mean to change the function: then there is nothing to hold it to
    exact = all(p.exact for p in own)
    if check and exact and record.inputs and device_of(model).type != "meta":
        verify(model, result, strict=True)
    return result


def make_plan_for(
    model: nn.Module,
    cfg: ConfigSource,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
) -> Plan:
    """The plan of a compilation without carrying it out (``fxshare.plan``).

    Nothing of the model is run, so a model on the meta device will do.
    """
    del calibration, example  # uniform ranks need no data; kept for the planners that do
    config = load_config(cfg)
    matching = match(model, config)
    return make_plan(config, matching.sites, matching.skipped)


@dataclass(frozen=True)
class _Stages:
    """What is known once the model is captured and matched."""

    model: nn.Module
    cfg: ShareConfig
    captured: Captured
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    batches: Iterable[object] | None

    def calibrate(self) -> Statistics | None:
        if self.batches is None:
            return None
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        return calibrate(
            self.model,
            self.captured,
            self.batches,
            self.sites,
            max_tokens=self.cfg.calibration.max_tokens,
            total=total,
        )


def _prepare(
    model: nn.Module,
    cfg: ShareConfig,
    calibration: Iterable[object] | None,
    example: object,
    mode: Mode | None,
) -> _Stages:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected an nn.Module to compile, found {type(model).__name__}; load the model first"
        )
    matching = match(model, cfg)
    first, batches = _peek(calibration)
    needs = [name for site in matching.sites for name in site.calls]
    captured = capture(
        model, first if example is None else example, mode=mode or cfg.capture, needs=needs
    )
    sites, skipped = _visible(captured.graph, matching)
    return _Stages(model, cfg, captured, sites, skipped, batches)


def _peek(
    calibration: Iterable[object] | None,
) -> tuple[object, Iterable[object] | None]:
    """The first batch, and all batches again; an iterator is read only once."""
    if calibration is None:
        return None, None
    if isinstance(calibration, (Tensor, Mapping)):
        raise CalibrationError(
            f"calibration: expected an iterable of batches, found one {type(calibration).__name__};"
            " wrap it in a list"
        )
    iterator: Iterator[object] = iter(calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the calibration data is empty: expected an iterable of batches; leave calibration "
            "out for a plain SVD"
        ) from None
    if isinstance(calibration, Sequence):
        return first, calibration
    return first, itertools.chain([first], iterator)


def _visible(
    gm: fx.GraphModule, matching: Matching
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """The sites that the graph calls; a linear that is never called stays as it is."""
    called = {call.name for call in linear_calls(gm)}
    sites, skipped = [], list(matching.skipped)
    for site in matching.sites:
        calls = tuple(name for name in site.calls if name in called)
        if not calls:
            skipped.append(
                Skipped(name=site.name, type=site.type, reason="is not called by this graph")
            )
        elif calls == site.calls:
            sites.append(site)
        else:
            sites.append(site.model_copy(update={"calls": calls}))
    return tuple(sites), tuple(skipped)


def _named_passes(cfg: ShareConfig) -> tuple[Pass, ...]:
    """The passes that the configuration names; each is imported from the user's own module."""
    found = []
    for name in cfg.passes:
        module_name, _, attribute = name.partition(":")
        try:
            made = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"passes: cannot import {name!r}: {error}; expected 'package.module:Name' on the "
                "Python path"
            ) from error
        if isinstance(made, type) and issubclass(made, Pass):
            made = made()
        if not isinstance(made, Pass):
            raise ConfigError(
                f"passes: {name!r} is a {type(made).__name__}; expected a subclass or an instance "
                "of passes.Pass"
            )
        found.append(made)
    return tuple(found)


def _check_plan(plan: Plan, sites: Sequence[Site]) -> None:
    found = {site.name: site for site in sites}
    for site in plan.sites:
        real = found.get(site.name)
        if real is None or real.slices != site.slices or real.in_features != site.in_features:
            raise PlanError(
                f"the plan's site {site.name!r} with {len(site.slices)} slices is not what the "
                f"configuration matches in this model; make the plan again with the same "
                "configuration"
            )


@dataclass(frozen=True)
class Factorised:
    """The factors of every group in the model's dtype, and what is known about them."""

    groups: tuple[SharedGroup, ...]
    weighted_errors: dict[str, float]
    slice_errors: dict[str, float]
    floored: dict[str, int]
    seconds: dict[str, float]


def _factorise(
    plan: Plan, weights: Mapping[str, Tensor], statistics: Statistics | None, cfg: ShareConfig
) -> Factorised:
    """Factorise group by group; groups with the same inputs share one whitening."""
    rows = {s.name: (site, s) for site in plan.sites for s in site.slices}
    sites_of = {
        group.name: tuple(dict.fromkeys(rows[name][0].name for name in group.slices))
        for group in plan.groups
    }
    order = list(plan.groups)
    if statistics is not None:
        order.sort(key=lambda group: statistics.key(sites_of[group.name]))
    made: dict[str, SharedGroup] = {}
    errors: dict[str, float] = {}
    slice_errors: dict[str, float] = {}
    floored: dict[str, int] = {}
    seconds: dict[str, float] = {}
    key: object = None
    whitening: Whitening | None = None
    for group in track(order, "factorising", total=len(order)):
        start = time.perf_counter()
        if statistics is None:
            whitening = identity_whitening(group.in_features)
        elif whitening is None or key != statistics.key(sites_of[group.name]):
            key = statistics.key(sites_of[group.name])
            pooled = pooled_gram([statistics.gram(name) for name in sites_of[group.name]])
            whitening = whiten(pooled, relative_floor=cfg.calibration.relative_floor)
        members = [rows[name] for name in group.slices]
        parts = {s.name: weights[site.name][s.start : s.stop] for site, s in members}
        try:
            factors = factorise(list(parts.values()), whitening, group.rank)
        except FactoriseError as error:
            raise FactoriseError(f"group {group.name!r}: {error}") from error
        dtype = next(iter(parts.values())).dtype
        basis = factors.basis_RI.to(dtype)
        coefficients = {
            name: c.to(dtype) for name, c in zip(parts, factors.coefficients, strict=True)
        }
        made[group.name] = SharedGroup(group.name, basis, coefficients)
        for name, coefficient in coefficients.items():
            product = coefficient.double() @ basis.double()
            slice_errors[name] = relative_error(parts[name], product)
        errors[group.name] = factors.weighted_error
        floored[group.name] = whitening.floored
        seconds[group.name] = time.perf_counter() - start
    ordered = tuple(made[group.name] for group in plan.groups)
    return Factorised(ordered, errors, slice_errors, floored, seconds)


def rewrite(
    graph: fx.GraphModule,
    plan: Plan,
    groups: Sequence[SharedGroup],
    fuse: bool,
    extra: Sequence[Pass] = (),
) -> tuple[fx.GraphModule, tuple[Applied, ...]]:
    """Apply the default passes for a plan to a captured graph."""
    sites = [
        SplitSite(site.calls, tuple(Rows(s.name, s.start, s.stop) for s in site.slices))
        for site in plan.sites
    ]
    return run(graph, default_passes(sites, groups, fuse=fuse, extra=extra))


def assemble(
    model: nn.Module, captured: Captured, rewritten: fx.GraphModule, plan: Plan, *, copy: bool
) -> nn.Module:
    """The finished module from a rewritten graph."""
    if captured.front_end == "modules":
        return put_back(model, rewritten, [c for s in plan.sites for c in s.calls], copy=copy)
    root = structure_copy(rewritten, clone_parameters=copy, clone_buffers=False)
    result = ShareModule(root, root.graph, f"{type(model).__name__}Shared")
    result.meta.update(rewritten.meta)
    return result


def attach(result: nn.Module, record: Record) -> None:
    """Put the record where :func:`fxshare.record.record_of` finds it."""
    result.__dict__["meta"]["fxshare"] = record
    if not isinstance(result, ShareModule):
        result.__dict__["fxshare"] = record


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _describe(statistics: Statistics) -> dict[str, Any]:
    return {
        "batches": statistics.batches,
        "tokens": statistics.tokens,
        "bytes": statistics.bytes,
        "seconds": statistics.seconds,
    }
