"""Compile again from the structure: the same capture, the same plan, tensors without values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxshare.capture import recapture, recapture_devices
from fxshare.capture.call import Shapes
from fxshare.errors import StoreError
from fxshare.factors.empty import empty_codes, empty_factors, empty_units
from fxshare.models.structure import freeze, keep_structure
from fxshare.result.fingerprint import graph_sha256
from fxshare.result.record import Lowered, Record
from fxshare.rewriting.assemble import assemble
from fxshare.rewriting.lowering import replay
from fxshare.rewriting.rewrite import rewrite
from fxshare.sites.visible import unstacked
from fxshare.store.manifest import DTYPES, Manifest
from fxshare.store.skeleton import hollow
from fxshare.store.units import unpacked
from passes import Pass, StoreCodes
from passes.errors import FxShareError


def rebuild(
    structure: nn.Module,
    manifest: Manifest,
    record: Record,
    passes: Sequence[Pass],
    device: torch.device,
) -> tuple[nn.Module, Lowered | None]:
    """The compiled module, its tensors without values, and how it is lowered, if it is.

    Raises :class:`StoreError` with the versions then and now where compiling fails.
    """
    first: tuple[nn.Module, Lowered | None] | None = None
    failure: Exception | None = None
    for place in recapture_devices(manifest.front_end, device):
        try:
            made = _compile_again(structure, manifest, record, passes, place)
            result, lowered = replay(made, record)
        except Exception as error:
            failure = failure or error
            continue
        if graph_sha256(result) == manifest.graph_sha256:
            return result, lowered
        first = first or (result, lowered)
    if first is not None:
        return first
    assert failure is not None
    kind = "" if isinstance(failure, FxShareError) else f"{type(failure).__name__}: "
    raise StoreError(
        f"the graph of {manifest.source.class_name} could not be built again: {kind}{failure}; "
        f"{manifest.then_and_now()}. Use those versions, or give the structure of the original as "
        "model=..."
    ) from failure


def _compile_again(
    structure: nn.Module,
    manifest: Manifest,
    record: Record,
    passes: Sequence[Pass],
    device: torch.device,
) -> nn.Module:
    dtypes = _dtypes(manifest, record)
    default = DTYPES[record.report.dtype]

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        fallback = default if isinstance(tensor, nn.Parameter) else tensor.dtype
        return dtypes.get(name, fallback) if tensor.is_floating_point() else tensor.dtype

    model = hollow(structure, dtype_of, device)
    if record.frozen is not None:
        freeze(model, record.frozen)
    captured = recapture(
        model,
        record.front_end,
        _shapes(record, device),
        record.relaxed,
        fills_mask=record.fills_mask,
    )
    captured = unstacked(captured, record.plan.sites)
    groups, pivots = empty_factors(
        record.plan, lambda site: dtypes.get(f"{site}.weight", default), device
    )
    units = empty_units(
        record.plan,
        lambda site: dtypes.get(f"{site}.weight", default),
        device,
        {name: unpacked(kept) for name, kept in manifest.kept_units.items()},
    )
    codes = empty_codes(record.plan, lambda site: dtypes.get(f"{site}.weight", default), device)
    rewritten, _ = rewrite(
        captured.graph,
        record.plan,
        groups,
        record.config.fuse,
        passes,
        pivots=pivots,
        units=units,
        codes=StoreCodes(weights=codes),
    )
    result = assemble(captured, rewritten, record.plan, copy=False)
    keep_structure(result, model, passes)
    return result


def _dtypes(manifest: Manifest, record: Record) -> dict[str, torch.dtype]:
    """The dtype of each tensor when the model was captured, by its name in the original.

    ``gm.half()`` afterwards changes the tensors and not the graph, in which dtypes are constants:
    what has the module's main dtype now had the model's main dtype then.
    """
    then = {manifest.dtype: record.report.dtype}
    found = {name: entry.dtype for name, entry in manifest.tensors.items()}
    for site in record.plan.sites:
        for call in site.readers:
            for leaf in ("weight", "bias"):
                name = f"{call}.{leaf}"
                found[name] = manifest.site_dtypes.get(site.name, manifest.dtype)
    return {name: DTYPES[then.get(dtype, dtype)] for name, dtype in found.items()}


def _shapes(record: Record, device: torch.device) -> Shapes | None:
    if not record.inputs:
        return None
    calls = [record.random_call(n, seed=0, device=device) for n in range(len(record.inputs))]
    return Shapes.between(calls[0], calls[1] if len(calls) > 1 else None)
