"""A few output values of a seeded call, to see whether a rebuilt module computes the same."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fxshare.base.numerics import float_leaves
from fxshare.capture import device_of, dtype_of, quiet
from fxshare.errors import CheckFailed
from fxshare.result.record import Record
from fxshare.verifying.evaluated import evaluated

_VALUES = 32
_HALF = (torch.float16, torch.bfloat16)


class Probe(BaseModel):
    """Values evenly spaced over the first floating-point output of a seeded call in eval mode.

    Spaced and not the first ones: those are of the first position, which in a causal model no
    attention weight has any influence on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int
    dtype: str = Field(pattern="^float(16|32|64)$|^bfloat16$")
    """What it was computed in: half-precision models in float32, where rounding hides less."""
    output: str
    shape: tuple[int, ...]
    scale: float
    """The largest magnitude of the whole output."""
    values: tuple[str, ...]
    """As hexadecimal float64."""


def take(module: nn.Module, record: Record, *, seed: int) -> Probe:
    """Run the module on the first of its example calls with random numbers in it.

    The module, the RNG and the grad mode stay as they are. Raises :class:`CheckFailed` when no
    output is floating-point, and what the module raises.
    """
    # a graph of torch.export asserts the dtypes that it was captured with
    wide = record.front_end != "export" and dtype_of(module) in _HALF
    copy = evaluated(module, wide)
    dtype = dtype_of(copy)
    call = {
        name: _cast(value, dtype)
        for name, value in record.random_call(0, seed=seed, device=device_of(module)).items()
    }
    with quiet(seed):
        path, output = next(iter(float_leaves(copy(**call))), ("", None))
    if output is None:
        raise CheckFailed(f"{type(module).__name__} has no floating-point output to compare")
    flat = output.detach().cpu().double().flatten()
    at = torch.linspace(0, max(len(flat) - 1, 0), min(_VALUES, len(flat))).long()
    finite = flat[flat.isfinite()]
    return Probe(
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        output=path,
        shape=tuple(output.shape),
        scale=float(finite.abs().max()) if len(finite) else 0.0,
        values=tuple(float(v).hex() for v in flat[at]),
    )


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def distance(saved: Probe, found: Probe) -> float:
    """The largest difference over the largest magnitude; infinite where the outputs are not of the
    same shape, or only one is NaN."""
    if (saved.output, saved.shape) != (found.output, found.shape):
        return math.inf
    largest = 0.0
    for a, b in zip(
        map(float.fromhex, saved.values), map(float.fromhex, found.values), strict=True
    ):
        same = a == b or (math.isnan(a) and math.isnan(b))
        gap = 0.0 if same else abs(a - b)
        largest = max(largest, math.inf if math.isnan(gap) else gap)
    if largest == 0.0:
        return 0.0
    return largest / saved.scale if saved.scale > 0 else math.inf
