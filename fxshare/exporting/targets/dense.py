"""``dense``: the original's state dict with the products multiplied out."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxshare.base.quantised import Quantised
from fxshare.base.randomness import randomness_as_before
from fxshare.capture import dtype_of
from fxshare.errors import CheckFailed, ExportError, StoreError
from fxshare.exporting.certifying.certificate import NAME as CERTIFICATE
from fxshare.exporting.codes import has_codes
from fxshare.exporting.packed import codes_by_module, pack
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written
from fxshare.models.original import Original, original_of
from fxshare.models.source import TRANSFORMERS
from fxshare.result.products import site_bias, slice_product, slices_of
from fxshare.sites.site import Site
from fxshare.sites.tensors import Stored, stored_at
from fxshare.store.manifest import SavedSource
from fxshare.store.skeleton import ModelSource, skeleton
from fxshare.store.tensors import tensors_of
from passes.graph.graph import is_linear, structure_copy

SUFFIX = ".safetensors"
_WEIGHTS = "model.safetensors"


def ours(name: str) -> bool:
    """Whether a folder of this target may hold a file of that name."""
    known = {CERTIFICATE, "config.json", "generation_config.json", f"{_WEIGHTS}.index.json"}
    return name in known or (name.startswith("model") and name.endswith(SUFFIX))


def write(subject: Subject, path: Path, original: ModelSource | None) -> Written:
    """Write ``path``, a file where it ends in ``.safetensors`` and a folder otherwise.

    A file, or the folder of a model that is not of transformers, holds every name of the
    original's state dict, tied weights under each of their names; ``load_state_dict`` takes it
    strictly. A transformers folder is what ``save_pretrained`` writes, with the codes in it where
    every matched weight is dense, some in few bits (:mod:`fxshare.exporting.packed`).

    Raises :class:`ExportError` for a parameter of the original that the compiled graph has no use
    for, unless ``original`` has it.
    """
    model = _original_module(subject, original)
    state = state_of(subject, original if isinstance(original, nn.Module) else None)
    if path.suffix == SUFFIX:
        save_file(state, path, metadata={"format": "pt"})
        stored = load_file(path)
    elif subject.record.source.kind == TRANSFORMERS and model is not None:
        return _write_transformers(subject, model, state, path)
    else:
        path.mkdir()
        save_file(state, path / _WEIGHTS, metadata={"format": "pt"})
        stored = load_file(path / _WEIGHTS)
    wrong = [name for name, t in state.items() if not torch.equal(t, stored[name])]
    if wrong:  # only a failing disk does this
        raise CheckFailed(f"{path}: tensor {wrong[0]!r} reads back with other values")
    shapes = subject.shapes
    if model is None:
        note = (
            "the output was not compared, only the weights: give original=..., the model or a "
            "function that makes one"
        )
        return Written(None, shapes.batch, shapes.sequence, (note,))
    return Written(_runner(_filled(model, stored), subject), shapes.batch, shapes.sequence)


def _runner(model: nn.Module, subject: Subject) -> Any:
    model.eval()
    device = next(iter(tensors_of(subject.model).values()))[1].device
    return lambda call: model.to(device)(**call, **subject.constants)


def state_of(
    subject: Subject, original: nn.Module | None, *, without: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """The original's state dict, but for the sites named in ``without``; every tensor on the CPU,
    in memory of its own.

    Raises :class:`ExportError` for a parameter that the compiled graph does not use, unless
    ``original`` has it.
    """
    names = original_of(subject.model)
    sites = [site for site in subject.record.plan.sites if site.name not in without]
    values = dict(_values(subject, names, sites))
    given = {} if original is None else original.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    missing = []
    for name, first in names.state.items():
        if name.rpartition(".")[0] in without:
            continue
        if first in values:
            value = values[first]
        elif name in given:
            value = given[name].detach()
        else:
            missing.append(name)
            continue
        state[name] = value.to("cpu", copy=True).contiguous()
    if missing:
        raise ExportError(
            f"the export writes every name of {subject.name}'s state dict, and the compiled graph "
            f"does not use {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; give original=..., "
            "the model, to take them from"
        )
    return state


def _values(
    subject: Subject, names: Original, sites: Iterable[Site]
) -> Iterator[tuple[str, Tensor]]:
    """Values by the first name of each tensor of the original: products in float64, rounded once
    to the dtype of their coefficients."""
    gm = subject.model
    for name, (_, tensor) in tensors_of(gm).items():
        if name in names.state:
            yield names.state[name], tensor.detach()
    biases: dict[str, dict[Stored, Tensor]] = {}
    weights: dict[str, dict[Stored, Tensor]] = {}
    for site in sites:
        product_OI = torch.cat([slice_product(gm, s.name) for s in site.slices])
        weight_OI = product_OI.to(_dtype_of_site(gm, site))
        bias = site_bias(gm, site)
        stored = stored_at(site, names.state)
        if stored is not None:
            turned = weight_OI.t() if site.transposed else weight_OI
            weights.setdefault(stored.weight, {})[stored] = turned
            if bias is not None:
                biases.setdefault(stored.bias, {})[stored] = bias
            continue
        for call in site.readers:
            turned = weight_OI.t() if call in names.transposed else weight_OI
            first = names.state.get(f"{call}.weight")
            if first is not None:
                yield first, turned
        if bias is not None:
            for call in site.calls:
                first = names.state.get(f"{call}.bias")
                if first is None:
                    raise ExportError(f"{call!r} has a bias that {subject.name} has no place for")
                yield first, bias
    for name, found in (*weights.items(), *biases.items()):
        if name not in names.state:
            raise ExportError(f"{subject.name} has no {name!r}, which the plan has parts of")
        yield names.state[name], _joined(found)


def _joined(parts: Mapping[Stored, Tensor]) -> Tensor:
    """A parameter from the sites that are its parts: matrices of a stack, or runs of rows."""
    in_order = [parts[one] for one in sorted(parts, key=lambda one: one.part or 0)]
    if next(iter(parts)).stacked:
        return torch.stack(in_order)
    return in_order[0] if len(in_order) == 1 else torch.cat(in_order)


def _dtype_of_site(gm: nn.Module, site: Site) -> torch.dtype:
    weight = gm.get_submodule(slices_of(gm)[site.slices[0].name].module).weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def _original_module(subject: Subject, original: ModelSource | None) -> nn.Module | None:
    """A module of the original's class; None where only its owner can make one."""
    try:
        # by way of JSON, as from a folder: a configuration may have numbers for keys
        plain = json.dumps(asdict(subject.record.source), default=str)
        return skeleton(SavedSource.model_validate_json(plain), original)
    except StoreError:
        if original is None:
            return None
        raise


def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The original with these weights, by its own ``load_state_dict``.

    One made on the meta device is made again: what is not in its state dict has to have values.
    """
    if any(t.device.type == "meta" for _, t in tensors_of(model).values()):
        with randomness_as_before():
            made: Any = type(model)
            model = made(model.config)
    else:
        model = structure_copy(model)
    try:
        model.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckFailed(
            f"{type(model).__name__} does not load what was written: {str(error).strip()}"
        ) from error
    return model


def _write_transformers(
    subject: Subject, model: nn.Module, state: Mapping[str, Tensor], path: Path
) -> Written:
    pretrained: Any = _filled(model, state)
    pretrained.tie_weights()
    pretrained.config.dtype = dtype_of(subject.model)
    codes, notes = _codes(subject, pretrained)
    # compressed-tensors has bars of its own, at the first call too
    silent = contextlib.redirect_stderr(io.StringIO()) if codes else contextlib.nullcontext()
    with no_progress(), silent:
        pretrained.save_pretrained(path)
        if codes:
            pack(path, codes, (n for n, m in pretrained.named_modules() if is_linear(m)))
        loaded, info = type(pretrained).from_pretrained(
            path, local_files_only=True, dtype="auto", output_loading_info=True
        )
        run = _runner(loaded, subject)
        if codes:
            run(subject.inputs)
    odd = {key: sorted(names) for key, names in info.items() if names}
    if odd:
        raise CheckFailed(f"transformers does not load what was written as it is: {odd}")
    return Written(run, subject.shapes.batch, subject.shapes.sequence, notes)


def _codes(subject: Subject, model: nn.Module) -> tuple[dict[str, Quantised], tuple[str, ...]]:
    """What is written as codes, by module, and what is to be said of it."""
    if not has_codes(subject.model):
        return {}, ()
    found = codes_by_module(subject, model)
    if isinstance(found, str):
        return {}, (f"weights in few bits were multiplied out: {found}",)
    return found, (f"{len(found)} weights are codes (compressed-tensors, pack-quantized)",)


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """Silence transformers' bars for files that it writes and reads in a moment."""
    transformers: Any = importlib.import_module("transformers")
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
