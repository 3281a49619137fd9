"""``fxshare.load``: a folder that :func:`fxshare.save` made, compiled again and filled."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fxshare.base.json_text import parse_json
from fxshare.base.numerics import beyond_rounding, tolerance
from fxshare.base.progress import stage
from fxshare.base.surroundings import plain_surroundings
from fxshare.base.unfinished import settle
from fxshare.capture import device_of
from fxshare.config import ShareConfig, load_config
from fxshare.errors import FxShareWarning, PlanError, StoreError
from fxshare.generation.shell import generate
from fxshare.loading.rebuild import rebuild
from fxshare.models.source import EMBEDDED, Source
from fxshare.plans.plan import Plan
from fxshare.result.face import Verbs
from fxshare.result.module import Compiled, attach, record_of
from fxshare.result.record import Record
from fxshare.result.report import Report
from fxshare.store.calls import decode_inputs
from fxshare.store.manifest import (
    CONFIG,
    DTYPES,
    PLAN,
    REPORT,
    Manifest,
    read_manifest,
    read_text,
    verify_files,
)
from fxshare.store.pretrained import save_pretrained
from fxshare.store.probe import Probe, distance, take
from fxshare.store.sizes import (
    check_embedded,
    check_inputs,
    check_plan_sizes,
    check_sizes,
    most_modules,
)
from fxshare.store.skeleton import ModelSource, skeleton
from fxshare.store.tensors import fill
from fxshare.store.units import check_units
from passes import Pass
from passes.errors import FxShareError

_LOG = logging.getLogger(__name__)


@plain_surroundings()
@stage("load", _LOG)
def load(
    path: str | os.PathLike[str],
    model: ModelSource | None = None,
    *,
    passes: Sequence[Pass] = (),
    device: str | torch.device | None = None,
    check: bool = True,
) -> Compiled:
    """Read a folder that :func:`save` made; the result is what was saved, tensor by tensor.

    The tensors are equal bit by bit, always. Outputs are with the same build of torch, on the same
    kind of processor and with the same number of threads; otherwise they are equal up to rounding.

    Parameters
    ----------
    path
        The folder.
    model
        The structure of the original model, where the folder cannot say it: a module (its weights
        are not used, and it is not changed), a function that makes one, or
        ``"package.module:function"``. Models of transformers and the embedded one need none.
    passes
        The passes of your own that the model was compiled with, in the same order.
    device
        Where the result is to be; the CPU where None.
    check
        Run the module on the call that was tried when it was saved, and compare.

    Raises
    ------
    StoreError
        The folder is damaged, from a newer version, needs ``model`` or ``passes``, or the rebuilt
        module is not the one that was saved.
    ConfigError, PlanError
        A configuration or a plan that this version of fxshare does not accept any more.
    """
    return _load(Path(path), model, passes, device=device, check=check, mapped=False)


def load_mapped(folder: Path, model: ModelSource | None, passes: Sequence[Pass]) -> Compiled:
    """:func:`load` on the CPU, with tensors that stay in the mapped files where their layout lets
    them: to look at, while the folder is there."""
    return _load(folder, model, passes, device=None, check=True, mapped=True)


def _load(
    folder: Path,
    model: ModelSource | None,
    passes: Sequence[Pass],
    *,
    device: str | torch.device | None,
    check: bool,
    mapped: bool,
) -> Compiled:
    settle(folder.resolve() if folder.is_symlink() else folder)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    check_sizes(folder, manifest)
    record = _record(folder, manifest)
    check_plan_sizes(folder, manifest, record.plan)
    check_units(folder, record.plan, manifest.kept_units)
    check_inputs(folder, manifest, record.inputs)
    _check_passes(folder, record, passes)
    target = torch.device("cpu" if device is None else device)
    if model is None and manifest.source.kind == EMBEDDED:
        check_embedded(folder, manifest, record.plan)
    structure = skeleton(manifest.source, model, most_modules(len(manifest.tensors)))
    result, lowered = rebuild(structure, manifest, record, passes, target)
    record = replace(record, lowered=lowered)
    fill(result, manifest.tensors, folder, list(manifest.files), target, mapped=mapped)
    for name, module in result.named_modules():
        module.training = manifest.training != (name in manifest.training_differs)
    verbs = Verbs(generate, save_pretrained)
    compiled = attach(result, record, verbs)
    difference = None
    if check and manifest.probe is not None and target.type != "meta":
        difference = _compare(folder, manifest, result, manifest.probe)
    if record_of(result).graph_sha256 != manifest.graph_sha256:
        note = f"the graph text differs from the saved one ({manifest.then_and_now()})"
        if difference is None:
            warnings.warn(f"{folder}: {note}; its output was not compared", FxShareWarning, 4)
        else:
            note += f"; the output is within {difference:.1e} of the saved one"
        notes = (*record.report.notes, note)
        attach(result, replace(record, report=replace(record.report, notes=notes)), verbs)
    return compiled


def _record(folder: Path, manifest: Manifest) -> Record:
    config: ShareConfig = load_config(folder / CONFIG)
    try:
        report = Report.from_dict(parse_json(read_text(folder, REPORT)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder / REPORT} is not a report: {error!s:.300}") from error
    return Record(
        config=config,
        plan=_plan(folder),
        report=report,
        front_end=manifest.front_end,
        source=Source(**manifest.source.model_dump()),
        relaxed=manifest.relaxed,
        slice_errors=manifest.slice_errors,
        bias_shifts=manifest.bias_shifts,
        other_shifts=manifest.other_shifts,
        refined=manifest.refined,
        inputs=decode_inputs(manifest.inputs),
        frozen=manifest.frozen,
        frozen_when_lowered=manifest.frozen_when_lowered,
        fills_mask=manifest.fills_mask,
        extra_passes=manifest.extra_passes,
        lowering=manifest.lowering,
    )


def _plan(folder: Path) -> Plan:
    try:
        return Plan.from_json(read_text(folder, PLAN))
    except PlanError as error:
        raise PlanError(f"{folder / PLAN}: {error}") from error


def _check_passes(folder: Path, record: Record, passes: Sequence[Pass]) -> None:
    expected = record.extra_passes
    found = tuple(p.name or type(p).__name__ for p in passes)
    if found == expected:
        return
    named = f" (the configuration names {', '.join(record.config.passes)})"
    raise StoreError(
        f"{folder}: the model was compiled with the passes {list(expected)}"
        f"{named if record.config.passes else ''}, found {list(found)}; give the same ones, in "
        "this order, as load(..., passes=[...]). load executes nothing that is only named in the "
        "folder"
    )


def _compare(folder: Path, manifest: Manifest, result: nn.Module, saved: Probe) -> float:
    record = record_of(result)
    depth = 2 * len(record.plan.sites) + 1
    limit = tolerance(DTYPES[saved.dtype], depth)
    try:
        found = take(result, record, seed=saved.seed)
        difference = distance(saved, found)
    except FxShareError:
        raise
    except Exception as error:
        raise StoreError(
            f"{folder}: the rebuilt module fails on the call that was tried when it was saved: "
            f"{type(error).__name__}: {error}; {manifest.then_and_now()}"
        ) from error
    if not difference <= limit or math.isnan(difference):
        far = f"{difference:.1e} of its largest value from the saved one"
        raise StoreError(
            f"{folder}: the rebuilt module's {saved.output} on {device_of(result)} is "
            f"{beyond_rounding(far, limit)}. {manifest.then_and_now()}; use those "
            "versions, or check=False to look at it all the same"
        )
    return difference
