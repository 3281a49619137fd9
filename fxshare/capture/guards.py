"""Functions that captured graphs call at run time, to hold what was specialised.

Tracing follows one path through the model. Where the path depended on a size or on an argument, the
graph holds the outcome, so that a call that would have gone another way is an error and not a wrong
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from fxshare.errors import GuardError

T = TypeVar("T")


@has_side_effect
def hold_guard(value: object, expected: object, where: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is what it was while tracing."""
    # a comparison of booleans is more than dynamo's symbolic sizes can do
    if isinstance(expected, bool):
        broken = not value if expected else bool(value)
    else:
        broken = value != expected
    if broken:
        raise GuardError(
            f"the model was captured on the path where {where} gave {expected}; this call gives "
            f"another value. Capture with an example like this call (example=...), or with "
            f"capture='modules', which follows every path"
        )


@has_side_effect
def hold_arguments(given: Mapping[str, object], captured: Mapping[str, object]) -> None:
    """Raise :class:`GuardError` when an argument is not what it was while tracing."""
    for name, value in given.items():
        if value is None and captured[name] is None:
            continue
        if isinstance(value, Tensor) or value != captured[name]:
            raise GuardError(
                f"argument {name!r}: the model was captured with {name}={captured[name]!r}, and "
                "the graph has no other path; capture it with an example call that has the "
                f"argument (example={{..., {name!r}: ...}}), or with capture='modules'"
            )


@has_side_effect
def hold_dtype(found: torch.dtype, captured: torch.dtype, why: str) -> None:
    """Raise :class:`GuardError` when the model was cast to another dtype since its capture."""
    if found != captured:
        raise GuardError(
            f"the model was captured in {captured} and cast to {found} afterwards, but {why}. Cast "
            "the original model and compile that, or use capture='modules', which keeps its code"
        )


@has_side_effect
def hold_given(value: T | None, name: str) -> T:
    """Raise :class:`GuardError` when an input that was traced is not given."""
    if value is None:
        raise GuardError(f"argument {name!r} is missing: the model was captured with it")
    return value


def ones_if_missing(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """An attention mask ``(batch, sequence)`` of ones where none is given: every token counts."""
    if mask is None:
        return torch.ones_like(input_ids)
    return mask
