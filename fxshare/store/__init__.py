"""Folders of compiled models: :func:`save` and :func:`load`.

A folder holds tensors and data, never code. Loading builds the graph again: from the structure of
the original model, the configuration and the plan, by the same front end and the same passes, on
tensors without values; then the saved tensors are put in. Nothing is unpickled, and nothing that is
only named in the folder is imported. docs/reference/folder.md describes every file.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshare.capture import device_of, dtype_of
from fxshare.config import ShareConfig, dump_config, load_config
from fxshare.errors import FxShareError, FxShareWarning, StoreError
from fxshare.generation.face import Verbs
from fxshare.generation.shell import generate
from fxshare.numerics import tolerance
from fxshare.plans import Plan
from fxshare.pretrained import save_pretrained, write_hf_configs
from fxshare.record import Record, attach, graph_sha256, record_of, slices_of
from fxshare.report import Report
from fxshare.source import Source
from fxshare.store.card import card
from fxshare.store.folder import new_folder
from fxshare.store.manifest import (
    CARD,
    CONFIG,
    DTYPES,
    PLAN,
    REPORT,
    REPORT_TABLE,
    Manifest,
    SavedSource,
    dtype_name,
    file_entry,
    read_manifest,
    read_text,
    verify_files,
    versions,
    write_manifest,
)
from fxshare.store.probe import Probe, distance, take
from fxshare.store.rebuild import decode_inputs, encode_inputs, rebuild
from fxshare.store.skeleton import ModelSource, skeleton
from fxshare.store.tensors import fill, tensors_of, write_tensors
from fxshare.store.tokenizer import TokenizerSource, write_tokenizer
from passes import Pass

MAX_SHARD_BYTES = 5 * 10**9
_PROBE_SEED = 20240917


def save(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: TokenizerSource | None = None,
) -> None:
    """Write a compiled model to a folder, whole or not at all.

    Parameters
    ----------
    gm
        What :func:`fxshare.compile` or :func:`fxshare.load` returned; its tensors are saved as they
        are now, so a trained one keeps what it learned.
    path
        The folder to make; missing parents are made too.
    force
        Replace a folder that :func:`save` made before, with everything in it.
    max_shard_bytes
        Tensors go into several files where one would be larger than this.
    tokenizer
        A folder whose tokenizer files are copied, or a tokenizer of transformers.

    Raises
    ------
    StoreError
        The folder exists, cannot be written, or the model has something that a folder cannot hold.
    FxShareError
        ``gm`` was not made by fxshare.
    """
    gm = getattr(gm, "_orig_mod", gm)  # what torch.compile wraps
    record = record_of(gm)
    if max_shard_bytes < 1:
        raise StoreError(f"max_shard_bytes: expected at least 1, found {max_shard_bytes}")
    if graph_sha256(gm) != record.graph_sha256:
        raise StoreError(
            f"the graph of {type(gm).__name__} was changed after it was compiled, and a folder is "
            "loaded by compiling again: make the change a pass and give it to fxshare.compile"
            "(passes=[...]), or save the weights yourself"
        )
    inputs = encode_inputs(record.inputs)
    source = _source_now(gm, record)
    probe = _probe_of(gm, record)
    with new_folder(Path(path), force=force) as folder:
        entries, names = write_tensors(tensors_of(gm), folder, max_shard_bytes)
        texts = {
            CONFIG: dump_config(record.config),
            PLAN: record.plan.to_json(),
            REPORT: record.report.to_json(),
            REPORT_TABLE: record.report.to_markdown(),
            CARD: card(record),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        main = dtype_name(dtype_of(gm))
        write_hf_configs(source, folder, dtype=main)
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder)
        manifest = Manifest(
            versions=versions(),
            source=SavedSource(**asdict(source)),
            front_end=record.front_end,
            relaxed=record.relaxed,
            extra_passes=record.extra_passes,
            lowering=record.lowering,
            training=gm.training,
            training_differs=tuple(n for n, m in gm.named_modules() if m.training != gm.training),
            dtype=main,
            site_dtypes={n: d for n, d in _site_dtypes(gm, record.plan).items() if d != main},
            inputs=inputs,
            slice_errors=dict(record.slice_errors),
            bias_shifts=dict(record.bias_shifts),
            tensors=entries,
            graph_sha256=record.graph_sha256,
            probe=probe if isinstance(probe, Probe) else None,
            no_probe=None if isinstance(probe, Probe) else probe,
            files={name: file_entry(folder / name) for name in (*names, *texts)},
        )
        write_manifest(folder, manifest)


@torch.inference_mode(False)  # what is made under it could never be trained
def load(
    path: str | os.PathLike[str],
    model: ModelSource | None = None,
    *,
    passes: Sequence[Pass] = (),
    device: str | torch.device | None = None,
    check: bool = True,
) -> Any:
    """Read a folder that :func:`save` made; the result is what was saved, tensor by tensor.

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
    folder = Path(path)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    record = _record(folder, manifest)
    _check_passes(folder, record, passes)
    target = torch.device("cpu" if device is None else device)
    structure = skeleton(manifest.source, model)
    result, lowered = rebuild(structure, manifest, record, passes, target)
    record = replace(record, lowered=lowered)
    fill(result, manifest.tensors, folder, list(manifest.files), target)
    for name, module in result.named_modules():
        module.training = manifest.training != (name in manifest.training_differs)
    verbs = Verbs(generate, save_pretrained)
    attach(result, record, verbs)
    difference = None
    if check and manifest.probe is not None and target.type != "meta":
        difference = _compare(folder, manifest, result, manifest.probe)
    if record_of(result).graph_sha256 != manifest.graph_sha256:
        note = f"the graph text differs from the saved one ({manifest.then_and_now()})"
        if difference is None:
            warnings.warn(f"{folder}: {note}; its output was not compared", FxShareWarning, 2)
        else:
            note += f"; the output is within {difference:.1e} of the saved one"
        notes = (*record.report.notes, note)
        attach(result, replace(record, report=replace(record.report, notes=notes)), verbs)
    return result


def _source_now(gm: nn.Module, record: Record) -> Source:
    """The source with the defaults of ``generate`` as the user may have changed them."""
    generation: Any = getattr(gm, "generation_config", None)
    if record.source.generation_config is None or not hasattr(generation, "to_dict"):
        return record.source
    return replace(record.source, generation_config=generation.to_dict())


def _record(folder: Path, manifest: Manifest) -> Record:
    config: ShareConfig = load_config(folder / CONFIG)
    try:
        report = Report.from_dict(json.loads(read_text(folder, REPORT)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder / REPORT} is not a report: {error}") from error
    return Record(
        config=config,
        plan=Plan.from_json(read_text(folder, PLAN)),
        report=report,
        front_end=manifest.front_end,
        source=Source(**manifest.source.model_dump()),
        relaxed=manifest.relaxed,
        slice_errors=manifest.slice_errors,
        bias_shifts=manifest.bias_shifts,
        inputs=decode_inputs(manifest.inputs),
        extra_passes=manifest.extra_passes,
        lowering=manifest.lowering,
    )


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


def _site_dtypes(gm: nn.Module, plan: Plan) -> dict[str, str]:
    places = slices_of(gm)
    found = {}
    for site in plan.sites:
        linear = gm.get_submodule(places[site.slices[0].name].module)
        assert isinstance(linear.weight, torch.Tensor)
        found[site.name] = dtype_name(linear.weight.dtype)
    return found


def _probe_of(gm: nn.Module, record: Record) -> Probe | str:
    if not record.inputs:
        return "captured without example inputs"
    try:
        return take(gm, record, seed=_PROBE_SEED)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


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
        raise StoreError(
            f"{folder}: the rebuilt module's {saved.output} on {device_of(result)} is "
            f"{difference:.1e} of its largest value from the saved one; rounding explains "
            f"{limit:.1e}. {manifest.then_and_now()}; use those versions, or check=False to look "
            "at it all the same"
        )
    return difference
