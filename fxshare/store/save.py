"""``fxshare.save``: a compiled model as a folder of tensors and data, whole or not at all."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import fx, nn

from fxshare.base.progress import stage
from fxshare.capture import dtype_of
from fxshare.config import dump_config
from fxshare.errors import FxShareWarning, StoreError
from fxshare.models.source import Source
from fxshare.plans.plan import Plan
from fxshare.result.fingerprint import graph_sha256
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from fxshare.result.record import Record
from fxshare.store.calls import encode_inputs
from fxshare.store.card import card
from fxshare.store.folder import new_folder
from fxshare.store.manifest import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    PLAN,
    REPORT,
    REPORT_TABLE,
    FileEntry,
    Manifest,
    TensorEntry,
    dtype_name,
    file_entry,
    versions,
    write_manifest,
)
from fxshare.store.probe import Probe, take
from fxshare.store.tensors import tensors_of, write_tensors
from fxshare.store.tokenizer import TokenizerSource, write_tokenizer
from fxshare.store.transformers import write_hf_configs
from fxshare.store.units import kept_units

_LOG = logging.getLogger(__name__)
MAX_SHARD_BYTES = 5 * 10**9
_PROBE_SEED = 20240917


@stage("save", _LOG)
def save(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: TokenizerSource | None = None,
    written: Callable[[Path], None] | None = None,
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
    written
        Called with the complete folder before it takes its place, which it does not where this
        raises.

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
    if not isinstance(gm, fx.GraphModule) and (gm._forward_pre_hooks or gm._forward_hooks):
        warnings.warn(
            f"{type(gm).__name__} itself has forward hooks, which no folder holds: register them "
            "again after fxshare.load",
            FxShareWarning,
            stacklevel=3,
        )
    inputs = encode_inputs(record.inputs)
    source = _source_now(gm, record)
    probe = _probe_of(gm, record)
    with new_folder(Path(path), force=force) as folder:
        entries, names = write_tensors(tensors_of(gm), folder, max_shard_bytes)
        texts = _texts(record)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_hf_configs(source, folder, dtype=dtype_name(dtype_of(gm)))
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder)
        files = {name: file_entry(folder / name) for name in (*names, *texts)}
        write_manifest(folder, _manifest(gm, record, source, inputs, probe, entries, files))
        if written is not None:
            written(folder)


def _texts(record: Record) -> dict[str, str]:
    """The files of a folder that people read."""
    return {
        CONFIG: dump_config(record.config),
        PLAN: record.plan.to_json(),
        REPORT: record.report.to_json(),
        REPORT_TABLE: record.report.to_markdown(),
        CARD: card(record),
    }


def _manifest(
    gm: nn.Module,
    record: Record,
    source: Source,
    inputs: tuple[dict[str, Any], ...],
    probe: Probe | str,
    tensors: dict[str, TensorEntry],
    files: dict[str, FileEntry],
) -> Manifest:
    main = dtype_name(dtype_of(gm))
    coded = any(entry.kind == "codes" for entry in tensors.values())
    return _checked(
        format_version=FORMAT_VERSION if coded else 1,
        versions=versions(),
        source=asdict(source),
        front_end=record.front_end,
        relaxed=record.relaxed,
        extra_passes=record.extra_passes,
        lowering=record.lowering,
        training=gm.training,
        training_differs=tuple(n for n, m in gm.named_modules() if m.training != gm.training),
        dtype=main,
        site_dtypes={n: d for n, d in _site_dtypes(gm, record.plan).items() if d != main},
        inputs=inputs,
        frozen=record.frozen,
        frozen_when_lowered=record.frozen_when_lowered,
        fills_mask=record.fills_mask,
        slice_errors=dict(record.slice_errors),
        bias_shifts=dict(record.bias_shifts),
        other_shifts=dict(record.other_shifts),
        kept_units=kept_units(slices_of(gm)),
        refined=record.refined,
        tensors=tensors,
        graph_sha256=record.graph_sha256,
        probe=probe if isinstance(probe, Probe) else None,
        no_probe=None if isinstance(probe, Probe) else probe,
        files=files,
    )


def _checked(**fields: Any) -> Manifest:
    """The manifest, held to what :func:`load` will ask of it."""
    try:
        return Manifest(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"a folder cannot hold this model: {where}: {first['msg']}") from error


def _source_now(gm: nn.Module, record: Record) -> Source:
    """The source with the defaults of ``generate`` as the user may have changed them."""
    generation: Any = getattr(gm, "generation_config", None)
    if record.source.generation_config is None or not hasattr(generation, "to_dict"):
        return record.source
    return replace(record.source, generation_config=generation.to_dict())


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
