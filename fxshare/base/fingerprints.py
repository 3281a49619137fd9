"""Hashes of what a computation depends on: tensors, batches, plain data, functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def of_model(model: nn.Module) -> str:
    """Of all parameters and buffers, by their names."""
    return of_tensors(_state(model))


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def of_batches(batches: Iterable[object]) -> str:
    """Of batches, whatever containers of tensors they are."""
    digest = hashlib.sha256()
    for batch in batches:
        leaves, spec = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
                digest.update(_bytes_of(leaf))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def of_json(value: object) -> str:
    """Of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function: what it computes cannot be hashed."""
    module = getattr(function, "__module__", type(function).__module__)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    if not flat.numel():
        return b""
    return flat.view(torch.uint8).numpy().data


__all__ = ["name_of", "of_batches", "of_json", "of_model", "of_tensors"]
