"""Whether a folder that was just written is the model that it was written from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fxshare.base.numerics import beyond_rounding, tolerance, worst
from fxshare.base.progress import stage
from fxshare.capture import device_of, dtype_of, quiet
from fxshare.capture.call import Call
from fxshare.capture.caller import Caller
from fxshare.errors import CheckFailed, FxShareWarning, StoreError
from fxshare.loading.load import load_mapped
from fxshare.models.source import USER
from fxshare.result.module import record_of
from fxshare.store.tensors import tensors_of
from fxshare.verifying.evaluated import evaluated
from passes import Pass

_LOG = logging.getLogger(__name__)


@stage("load again", _LOG)
def check_saved(
    folder: Path,
    gm: nn.Module,
    model: nn.Module,
    *,
    example: object = None,
    passes: Sequence[Pass] = (),
) -> None:
    """Load ``folder`` and compare it with ``gm``, compiled from ``model``: every tensor bit by bit,
    and the output on random numbers of the captured form, which is small, or where there is none
    on ``example``.

    Tensors stay in the mapped file, so this takes the time of a load and of two calls, and little
    memory beside the model's own.

    Raises :class:`CheckFailed` for a difference, and :class:`StoreError` for what cannot be loaded.
    """
    loaded = _loaded(folder, gm, model, passes)
    before = tensors_of(gm)
    for name, (_, tensor) in tensors_of(loaded).items():
        if not _equal(before[name][1].detach().cpu(), tensor):
            raise CheckFailed(
                f"{folder}: tensor {name!r} reads back with other values than were saved; the disk "
                "or the file system is at fault. Nothing was saved"
            )
    call = _call(gm, model, example)
    if call is None:
        return
    with quiet():
        expected, found = evaluated(gm, False)(**call), evaluated(loaded, False)(**call)
    limit = tolerance(dtype_of(gm), 2 * len(record_of(gm).plan.sites) + 1)
    distance = worst(expected, found)
    if not distance.relative <= limit:
        raise CheckFailed(
            f"{folder}: the output of what was saved differs from the compiled model's by "
            f"{beyond_rounding(distance, limit)}. Nothing was saved"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    # a number that is none is still the one that was saved
    nan = one.is_floating_point() and torch.equal(one.isnan(), other.isnan())
    return nan and torch.equal(one.nan_to_num(), other.nan_to_num())


def _loaded(folder: Path, gm: nn.Module, model: nn.Module, passes: Sequence[Pass]) -> nn.Module:
    if record_of(gm).source.kind == USER:
        return load_mapped(folder, model, passes)
    try:
        return load_mapped(folder, None, passes)
    except StoreError as alone:
        try:
            loaded = load_mapped(folder, model, passes)
        except StoreError:
            raise alone from None
        warnings.warn(
            f"the saved folder loads only with the original's structure (model=..., --original): "
            f"{type(model).__name__} is not what its configuration says ({alone!s:.200})",
            FxShareWarning,
            stacklevel=3,
        )
        return loaded


def _call(gm: nn.Module, model: nn.Module, example: object) -> Call | None:
    record = record_of(gm)
    if record.inputs:
        return record.random_call(0, seed=0, device=device_of(gm))
    return None if example is None else Caller(model, record.arguments)(example)


__all__ = ["check_saved"]
