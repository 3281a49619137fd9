"""The module of a plan and its factors, and the record of how it was made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from fxshare.calibration.statistics import Statistics
from fxshare.capture import dtype_of
from fxshare.compiling.stages import Stages
from fxshare.factors.realise import Factorised
from fxshare.models.source import Source
from fxshare.models.structure import frozen_in, keep_structure
from fxshare.plans.plan import Plan
from fxshare.proposing.coverage import left_dense
from fxshare.result.group_report import group_reports
from fxshare.result.record import Record
from fxshare.result.report import Report
from fxshare.rewriting.assemble import assemble
from fxshare.rewriting.rewrite import rewrite
from passes import Pass, StoreCodes
from passes.runner import Applied


def built(
    stages: Stages,
    plan: Plan,
    factors: Factorised,
    statistics: Statistics | None,
    own: Sequence[Pass],
    *,
    copy: bool,
    start: float,
) -> tuple[nn.Module, Record]:
    """The rewritten model, not yet a compiled one, and its record. ``start`` is when the work
    began, by ``time.perf_counter``."""
    model, cfg = stages.model, stages.cfg
    rewritten, applied = rewrite(
        stages.captured.graph,
        plan,
        factors.groups,
        cfg.fuse,
        own,
        pivots=factors.pivots,
        units=factors.units,
        codes=StoreCodes(weights=factors.codes, biases=factors.code_biases),
    )
    result = assemble(stages.captured, rewritten, plan, copy=copy)
    keep_structure(result, model, own)
    contract = stages.captured.contract
    record = Record(
        config=cfg,
        plan=plan,
        report=_report(stages, plan, factors, statistics, applied, result, start),
        front_end=stages.captured.front_end,
        source=Source.of(model),
        relaxed=stages.captured.relaxed,
        slice_errors=factors.slice_errors,
        bias_shifts=factors.bias_shifts,
        inputs=Record.specs(stages.captured.shapes),
        frozen=frozen_in(model),
        fills_mask=contract is None or contract.fills_mask,
        extra_passes=tuple(p.name or type(p).__name__ for p in own),
    )
    return result, record


def _report(
    stages: Stages,
    plan: Plan,
    factors: Factorised,
    statistics: Statistics | None,
    applied: Sequence[Applied],
    result: nn.Module,
    start: float,
) -> Report:
    model = stages.model
    dense = left_dense(model, plan.sites, plan.skipped)
    return Report(
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
        warnings=() if dense is None else (dense,),
        seconds={
            "capture": stages.captured.seconds,
            "calibrate": statistics.seconds if statistics else 0.0,
            "factorise": sum(factors.seconds.values()),
            "rewrite": sum(a.seconds for a in applied),
            "total": time.perf_counter() - start,
        },
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _describe(statistics: Statistics) -> dict[str, Any]:
    return {
        "batches": statistics.batches,
        "tokens": statistics.tokens,
        "bytes": statistics.bytes,
        "seconds": statistics.seconds,
        "starts_with": statistics.starts_with,
    }


__all__ = ["built"]
