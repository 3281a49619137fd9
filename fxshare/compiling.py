"""``fxshare.compile`` and ``fxshare.plan``: the stages, one after the other."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.budgeting import Budgeted, options_of, plan_within_budget, site_biases
from fxshare.calibrate import calibrate
from fxshare.capture import Captured, Mode, bind, capture, device_of, dtype_of
from fxshare.capture.call import without_labels
from fxshare.capture.modules_front_end import put_back
from fxshare.config import ConfigSource, ShareConfig, load_config
from fxshare.errors import CalibrationError, ConfigError, MatchError, PlanError
from fxshare.factors import Factorised, planned_factors, remade_factors, sharing_factors
from fxshare.generation import keep_structure
from fxshare.generation.face import Verbs
from fxshare.generation.shell import generate
from fxshare.knowing import init
from fxshare.losses import Loss
from fxshare.lowering import lower_module, with_lowered
from fxshare.matching import dense_weights, match
from fxshare.original import keep_original
from fxshare.planned import (
    Alternative,
    Sweep,
    alternatives,
    make_problem,
    nodes_of,
    slice_statistics,
    sweep_budgets,
)
from fxshare.planning import make_plan, uniform_plan
from fxshare.plans import Plan, Site, Skipped
from fxshare.pretrained import save_pretrained
from fxshare.record import Record, ShareModule, attach
from fxshare.report import Report, group_reports
from fxshare.source import Source
from fxshare.spectra import Spectra
from fxshare.statistics import Statistics
from fxshare.verifying import verify
from fxshare.visible import unstacked, visible_sites
from fxshare.weights import quantisation_of, refusal_of_quantised
from passes import (
    Applied,
    LookedUp,
    Pass,
    PivotedGroup,
    Rows,
    SharedGroup,
    SplitSite,
    default_passes,
    derive_gathers,
    run,
    structure_copy,
)


@torch.inference_mode(False)  # what is made under it could never be trained
def compile(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    plan: Plan | None = None,
    capture: Mode | None = None,
    passes: Sequence[Pass] = (),
    loss: Loss | None = None,
    copy: bool = False,
    check: bool = True,
    seed: int = 0,
) -> Any:
    """Rewrite a model under a configuration; the model itself is never touched.

    Parameters
    ----------
    model
        Any ``nn.Module``. Parameters that no pattern matches are shared with the result.
    cfg
        A :class:`ShareConfig`, a mapping, a path to YAML, or a list of these (later ones win).
        Where None, what :func:`fxshare.init` finds in the model: exact mode. A budget goes with it
        as ``[fxshare.init(model), {"budget": {"params_kept": 0.8}}]``.
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
    loss
        For a budget: ``(output, batch) -> scalar``, summed over tokens, whose increase the planner
        minimises. Next-token cross-entropy for language models where None, else the output's
        energy.
    copy
        Clone the parameters that are not rewritten, so that training the result leaves the model
        alone.
    check
        Verify the result on small random inputs before handing it out.
    seed
        Of the random choices: sampled labels.

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
    stages = _prepare(model, _config(model, cfg), calibration, example, capture)
    cfg = stages.cfg
    own = (*_named_passes(cfg), *passes)
    plan, factors, statistics = _plan_and_factors(stages, plan, loss, seed)
    rewritten, applied = rewrite(
        stages.captured.graph, plan, factors.groups, cfg.fuse, own, pivots=factors.pivots
    )
    result = assemble(model, stages.captured, rewritten, plan, copy=copy)
    keep_structure(result, model, own)
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
        bias_shifts=factors.bias_shifts,
        inputs=Record.specs(stages.captured.shapes),
        extra_passes=tuple(p.name or type(p).__name__ for p in own),
    )
    if cfg.lower is not None:
        result, lowered = lower_module(result, cfg.lower.prefer)
        record = with_lowered(record, lowered, result)
    attach(result, record, Verbs(generate, save_pretrained))
    # a pass of the user's own may mean to change the function: then there is nothing to hold it to
    exact = all(p.exact for p in own)
    if check and exact and record.inputs and device_of(model).type != "meta":
        verify(model, result, strict=True)
    return result


def _plan_and_factors(
    stages: _Stages, plan: Plan | None, loss: Loss | None, seed: int
) -> tuple[Plan, Factorised, Statistics | None]:
    """The plan (made, or checked where it was given), and the factors that realise it."""
    model, cfg = stages.model, stages.cfg
    if plan is not None:
        _check_plan(plan, stages.sites)
    elif cfg.mode != "planned":
        plan = make_plan(cfg, stages.sites, stages.skipped)
    weights = dense_weights(model, stages.sites if plan is None else plan.sites)
    if plan is None:
        budgeted = _budgeted(stages, weights, loss, seed)
        plan, made = budgeted.plan, budgeted.factors
        statistics: Statistics | None = budgeted.statistics
    elif plan.mode == "planned" and plan.groups:
        statistics = stages.calibrate(gradients=True, loss=loss, seed=seed)
        if statistics is None:
            raise CalibrationError(
                "a planned plan needs calibration data to be carried out: give calibration=..."
            )
        made = remade_factors(plan, weights, statistics, cfg)
    else:
        given = stages.calibrate() if plan.groups else None
        return plan, sharing_factors(plan, weights, given, cfg), given
    biases = site_biases(model, plan.sites)
    return plan, planned_factors(plan, weights, biases, made), statistics


def _budgeted(
    stages: _Stages, weights: Mapping[str, Tensor], loss: Loss | None, seed: int
) -> Budgeted:
    if stages.batches is None:
        raise CalibrationError(
            "a budget needs calibration data to predict losses with: give calibration=..., or use "
            "group_size and compression_rate, which do without"
        )
    return plan_within_budget(
        stages.model,
        stages.captured,
        stages.sites,
        stages.skipped,
        weights,
        stages.batches,
        stages.cfg,
        loss=loss,
        seed=seed,
    )


def _config(model: nn.Module, cfg: ConfigSource | Sequence[ConfigSource] | None) -> ShareConfig:
    return init(model) if cfg is None else load_config(cfg)


def make_plan_for(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Plan:
    """The plan of a compilation without carrying it out (``fxshare.plan``).

    ``cfg`` as in :func:`compile`. In exact and sharing mode nothing of the model is run, so a model
    on the meta device will do. A budget needs ``calibration`` to be spent well; without it the plan
    has uniform ranks, each slice for itself, and says sizes and FLOPs only.
    """
    config = _config(model, cfg)
    _check_module(model)
    if calibration is not None or example is not None:
        # captured, so that the plan leaves out what the graph never calls
        stages = _prepare(model, config, calibration, example, None)
        if config.mode != "planned":
            return make_plan(config, stages.sites, stages.skipped)
        if calibration is None:
            return uniform_plan(config, stages.sites, stages.skipped)
        return _budgeted(stages, dense_weights(model, stages.sites), loss, seed).plan
    matching = match(model, config)
    if config.mode == "planned":
        return uniform_plan(config, matching.sites, matching.skipped)
    return make_plan(config, matching.sites, matching.skipped)


@dataclass(frozen=True)
class Survey:
    """A plan, and what else there was to be had: what each dense slice could be instead (nothing
    without data), and the losses of other budgets where they were asked for."""

    plan: Plan
    alternatives: Mapping[str, Alternative | None]
    sweep: Sweep | None = None


def survey(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource],
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    loss: Loss | None = None,
    seed: int = 0,
    shares: Sequence[float] = (),
) -> Survey:
    """:func:`make_plan_for`, and what the plan can be compared with.

    ``shares`` are further budgets to plan for, as shares of the dense cost, on the statistics of
    the first calibration and without a search; :class:`PlanError` unless the configuration has a
    budget and there is data.
    """
    config = load_config(cfg)
    if config.budget is None or calibration is None:
        if shares:
            what = "a budget" if config.budget is None else "calibration data"
            raise PlanError(
                f"a sweep predicts losses under budgets and needs {what}: give "
                f"{'budget: {params_kept: 0.8}' if config.budget is None else 'calibration=...'}"
            )
        made = make_plan_for(
            model, config, calibration=calibration, example=example, loss=loss, seed=seed
        )
        return Survey(made, {})
    stages = _prepare(model, config, calibration, example, None)
    weights = dense_weights(model, stages.sites)
    budgeted = _budgeted(stages, weights, loss, seed)
    plan, statistics = budgeted.plan, budgeted.statistics
    planner = config.planner
    options = options_of(config.budget, planner, model)
    slices = slice_statistics(stages.sites, weights, statistics, centred=planner.bias)
    spectra = Spectra(slices, config.calibration.relative_floor)
    problem = make_problem(nodes_of(stages.sites, slices), spectra, options)
    swept = None
    if shares:
        swept = sweep_budgets(
            problem, shares, options, strategy=planner.strategy, loss_name=statistics.loss
        )
    grouped = {name for group in plan.groups for name in group.slices}
    dense = [s.name for x in plan.sites for s in x.slices if s.name not in grouped]
    price = 0.0 if plan.outlook is None else plan.outlook.price
    return Survey(plan, alternatives(problem, dense, price), swept)


@dataclass(frozen=True)
class _Stages:
    """What is known once the model is captured and matched."""

    model: nn.Module
    cfg: ShareConfig
    captured: Captured
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    batches: Iterable[object] | None

    def calibrate(
        self, *, gradients: bool = False, loss: Loss | None = None, seed: int = 0
    ) -> Statistics | None:
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
            gradients=gradients,
            loss=loss,
            labels=self.cfg.planner.labels,
            seed=seed,
        )


def _prepare(
    model: nn.Module,
    cfg: ShareConfig,
    calibration: Iterable[object] | None,
    example: object,
    mode: Mode | None,
) -> _Stages:
    _check_module(model)
    matching = match(model, cfg)
    first, batches = _peek(calibration)
    # an embedding that the graph reads another way is no reason to do without a graph
    needs = [name for site in matching.sites for name in site.calls]
    if example is None and first is not None:
        # labels among the data are for training; an example that has them wants the loss
        example = without_labels(model, bind(model, first))
    captured = capture(model, example, mode=mode or cfg.capture, needs=needs)
    captured = unstacked(captured, matching.sites)
    side_by_side = captured.front_end == "modules"
    sites, skipped = visible_sites(captured.graph, matching, side_by_side=side_by_side)
    if not sites and side_by_side:
        raise MatchError(f"nothing to rewrite: {skipped[0].name!r} {skipped[0].reason}")
    if not sites:
        raise MatchError(
            f"nothing to rewrite: none of the matched modules is called, {skipped[0].name!r} for "
            "one; give an example that reaches them, or other patterns"
        )
    return _Stages(model, cfg, captured, sites, skipped, batches)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected an nn.Module to compile, found {type(model).__name__}; load the model first"
        )
    method = quantisation_of(getattr(model, "config", None))
    if method is not None:
        raise MatchError(refusal_of_quantised(type(model).__name__, method))


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
    try:
        iterator: Iterator[object] = iter(calibration)
    except TypeError:
        raise CalibrationError(
            f"calibration: expected an iterable of batches, found {type(calibration).__name__}"
        ) from None
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
                "configuration matches in this model and its graph calls; make the plan again with "
                "the same configuration and the same example or calibration data"
            )


def rewrite(
    graph: fx.GraphModule,
    plan: Plan,
    groups: Sequence[SharedGroup],
    fuse: bool,
    extra: Sequence[Pass] = (),
    *,
    pivots: Sequence[PivotedGroup] = (),
) -> tuple[fx.GraphModule, tuple[Applied, ...]]:
    """Apply the default passes for a plan to a captured graph."""
    sites = [
        SplitSite(site.calls, tuple(Rows(s.name, s.start, s.stop) for s in site.slices))
        for site in plan.sites
        if not site.lookups
    ]
    looked_up = [
        LookedUp(site.slices[0].name, site.lookups, site.calls)
        for site in plan.sites
        if site.lookups
    ]
    passes = default_passes(sites, groups, pivots, fuse=fuse, extra=extra, looked_up=looked_up)
    return run(graph, passes)


def assemble(
    model: nn.Module, captured: Captured, rewritten: fx.GraphModule, plan: Plan, *, copy: bool
) -> nn.Module:
    """The finished module from a rewritten graph."""
    if captured.front_end == "modules":
        sites = [c for s in plan.sites for c in s.calls]
        whole = put_back(model, rewritten, sites, copy=copy)
        keep_original(whole, model)
        return whole
    root = structure_copy(rewritten, clone_parameters=copy, clone_buffers=False)
    result = ShareModule(root, root.graph, f"{type(model).__name__}Shared")
    result.meta.update(rewritten.meta)
    keep_original(result, model)
    derive_gathers(result)  # fx registers every buffer that a graph reads as part of the state
    return result


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _describe(statistics: Statistics) -> dict[str, Any]:
    return {
        "batches": statistics.batches,
        "tokens": statistics.tokens,
        "bytes": statistics.bytes,
        "seconds": statistics.seconds,
    }
