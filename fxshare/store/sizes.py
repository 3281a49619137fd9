"""Sizes that a folder states, held to one another before anything of such a size is made.

The files are there: how many bytes they have is known. The manifest's tensors must fit in them, and
every other size must fit the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from fxshare.errors import StoreError
from fxshare.plans.plan import Group, Plan
from fxshare.result.inputs import InputSpec
from fxshare.sites.site import Site
from fxshare.store.manifest import DTYPES, MANIFEST, PLAN, Manifest
from fxshare.store.tensors import is_tensor_file
from passes.graph.names import shortened

_MOST_INPUTS = 1 << 20
"""Numbers in an example call, where the model is smaller than that: one image of 3 × 512 × 512."""
_MOST_DIMENSIONS = 16
_COUNT = re.compile(r"layers?$|depths?$|labels$|^(num|n)_")
"""Keys of a configuration by which modules, or entries of a list, are counted."""
_LEAST_COUNT = 4096
_PER_TENSOR = 16
_LEAST_MADE = 4096


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Hold tensors to the files, and the counts of a configuration to the tensors.

    Raises :class:`StoreError` naming what is too large.
    """
    path = folder / MANIFEST
    there = sum(entry.bytes for name, entry in manifest.files.items() if is_tensor_file(name))
    said = sum(
        math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        for entry in manifest.tensors.values()
        if entry.same_as is None and entry.shares is None
    )
    if said > there:
        raise StoreError(
            f"{path}: the tensors need {said:,} bytes, and the files of tensors have {there:,}"
        )
    most = max(_LEAST_COUNT, _numbers(manifest))
    for key, value in _numbers_in(manifest.source.config or {}):
        if _COUNT.search(key) and value > most:
            raise StoreError(
                f"{path}: source.config.{key[:80]} is {value:.4g}, more than all numbers in the "
                f"folder ({most:,}): expected a size of the model that was saved"
            )


def check_plan_sizes(folder: Path, manifest: Manifest, plan: Plan) -> None:
    """Hold the groups of a plan to the tensors: a basis and its coefficients are stored, or what
    they were multiplied out to."""
    most = _numbers(manifest)
    parts: list[Site | Group] = [*plan.sites, *plan.groups]
    for part in parts:
        sizes = (part.in_features, part.out_features)
        if min(sizes) < 1 or max(sizes) > most:
            raise StoreError(
                f"{folder / PLAN}: {shortened(part.name)} is {sizes[0]:.4g} → {sizes[1]:.4g}, and "
                f"the folder has {most:,} numbers in all"
            )


def check_inputs(folder: Path, manifest: Manifest, calls: tuple[Mapping[str, Any], ...]) -> None:
    """Hold the example calls, which are made and run to capture the model, to its size."""
    most = max(_MOST_INPUTS, _numbers(manifest))
    for call in calls:
        for name, value in call.items():
            for spec in pytree.tree_leaves(value):
                if isinstance(spec, InputSpec):
                    _check_spec(folder / MANIFEST, name, spec, most)


def most_modules(tensors: int) -> int:
    """How many parameters and submodules the original of so many tensors can have."""
    return _LEAST_MADE + _PER_TENSOR * tensors


def check_embedded(folder: Path, manifest: Manifest, plan: Plan) -> None:
    """Hold the parameters of the embedded model, counted on paper, to what is stored: every site
    is there whole or as a group's basis and coefficients, and all else as it was."""
    config = manifest.source.config or {}
    sizes = {"n_layer": 0, "n_embd": 0, "vocab_size": 0, "block_size": 0, **config}
    layers, width, words, context = (
        sizes[key] for key in ("n_layer", "n_embd", "vocab_size", "block_size")
    )
    hidden = config.get("n_ffn") or 0
    if not all(type(size) is int and size >= 0 for size in (layers, width, words, context, hidden)):
        raise StoreError(
            f"{folder / MANIFEST}: source.config: expected sizes as whole numbers of at least 0"
        )
    hidden = hidden or 4 * width
    paper = layers * (4 * width * width + 2 * width * hidden) + (words + context) * width
    most = _numbers(manifest) + plan.dense_numbers
    if paper > most:
        raise StoreError(
            f"{folder / MANIFEST}: source.config: the embedded model of n_layer={layers:.4g}, "
            f"n_embd={width:.4g} has {paper:.4g} parameters, and the folder holds what {most:,} "
            "were made into"
        )


def _check_spec(path: Path, name: str, spec: InputSpec, most: int) -> None:
    sizes = f"{name}: an example of shape {spec.shape!s:.80}"
    if any(size < 0 for size in spec.shape) or len(spec.shape) > _MOST_DIMENSIONS:
        raise StoreError(
            f"{path}: inputs.{sizes}: expected sizes of at least 0, {_MOST_DIMENSIONS} at most"
        )
    if math.prod(spec.shape) > most:
        raise StoreError(
            f"{path}: inputs.{sizes} has {math.prod(spec.shape):.4g} numbers; expected at most "
            f"{most:,}, for a model of this size"
        )
    if not -math.inf < spec.low <= spec.high < math.inf:
        raise StoreError(
            f"{path}: inputs.{sizes}: expected a finite range, found {spec.low} to {spec.high}"
        )


def _numbers(manifest: Manifest) -> int:
    """Stored numbers: those of every tensor that is not another's."""
    return sum(
        math.prod(entry.shape)
        for entry in manifest.tensors.values()
        if entry.same_as is None and entry.shares is None
    )


def _numbers_in(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers_in(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers_in(inner, key)
    elif isinstance(value, (int, float)):
        yield key, value


__all__ = ["check_embedded", "check_inputs", "check_plan_sizes", "check_sizes", "most_modules"]
