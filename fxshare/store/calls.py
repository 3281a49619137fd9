"""Example calls as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxshare.base.names import as_argument
from fxshare.capture.call import Call
from fxshare.errors import StoreError
from fxshare.result.inputs import InputSpec
from fxshare.store.manifest import DTYPES, dtype_name
from passes.graph.names import shortened


def encode_inputs(calls: Sequence[Call]) -> tuple[dict[str, Any], ...]:
    """Example calls as JSON: ``{"tensor": …}``, ``{"tuple": […]}``, ``{"dict": {…}}``,
    ``{"dtype": …}``, lists, and plain constants.

    Raises :class:`StoreError` naming an argument of another kind.
    """
    return tuple({name: _encode(name, value) for name, value in call.items()} for call in calls)


def _encode(name: str, value: object) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, InputSpec):
        spec = {"shape": list(value.shape), "dtype": value.dtype}
        return {"tensor": {**spec, "low": value.low, "high": value.high}}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if type(value) is list:
        return [_encode(name, item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encode(name, item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(name, item) for key, item in value.items()}}
    raise StoreError(
        f"argument {name!r} of the example call is a {type(value).__name__}, which a folder cannot "
        "describe; compile with an example of tensors, numbers and strings, or with "
        "capture='modules'"
    )


def decode_inputs(calls: Sequence[Mapping[str, Any]]) -> tuple[Call, ...]:
    """The inverse of :func:`encode_inputs`; :class:`StoreError` for anything else."""
    try:
        return tuple(
            {as_argument(name): _decode(value) for name, value in call.items()} for call in calls
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the folder's example calls cannot be read: {error!r:.300}") from error


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        dtype = dtype_name(_dtype(content["dtype"]))
        shape = tuple(int(size) for size in content["shape"])
        return InputSpec(shape, dtype, float(content["low"]), float(content["high"]))
    if kind == "dtype":
        return _dtype(content)
    if kind == "tuple":
        return tuple(_decode(item) for item in content)
    if kind == "dict":
        return {key: _decode(item) for key, item in content.items()}
    raise ValueError(f"unknown kind of value {shortened(kind)}")


def _dtype(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}; found {shortened(name)}")
    return DTYPES[name]
