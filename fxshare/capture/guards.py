"""Functions that captured graphs call at run time, to hold what was specialised.

Tracing follows one path through the model. Where the path depended on a size or on an argument, the
graph holds the outcome, so that a call that would have gone another way is an error and not a wrong
number.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from fxshare.capture.forms import Form, form_of, matches, shown, shown_value
from fxshare.errors import GuardError

T = TypeVar("T")
WAY_OUT = (
    "capture it with an example call like this one (example=...), or with capture='modules', which "
    "runs the model's own code"
)


class Default(enum.Enum):
    """Stands for a default value that the code of a graph cannot hold; fx writes the members of an
    enumeration by name."""

    OWN = "the original's own default"


OMITTED: Form = ("default",)
"""The form of :attr:`Default.OWN`."""


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
        if value is captured[name]:  # nearly every call
            continue
        form = form_of(captured[name])
        if not matches(value, form):
            raise GuardError(not_as_captured(name, shown(form), value))


@has_side_effect
def hold_form(value: object, forms: Sequence[Form], name: str) -> None:
    """Raise :class:`GuardError` when an argument has none of these forms: it has other containers
    than while tracing, or other values beside the tensors in them."""
    if value is Default.OWN:
        if OMITTED in forms:
            return
    elif any(matches(value, form) for form in forms):
        return
    captured = [shown(form) for form in forms if form != OMITTED]
    raise GuardError(not_as_captured(name, captured[0] if captured else "its default", value))


def not_as_captured(name: str, captured: str, value: object) -> str:
    """The message about an argument that is not as it was captured."""
    found = "leaves it out" if value is Default.OWN else f"gives {shown_value(value)}"
    return (
        f"argument {name!r}: the model was captured with {name}={captured}, and the graph has no "
        f"other path; this call {found}. Give it as captured, or {WAY_OUT}"
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
    if value is None or value is Default.OWN:
        raise GuardError(
            f"argument {name!r} is missing: the model was captured with it. Give it, or {WAY_OUT}"
        )
    return value


def ones_if_missing(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """An attention mask ``(batch, sequence)`` of ones where none is given: every token counts."""
    if mask is None:
        return torch.ones_like(input_ids)
    return mask
