"""What a captured model may be called with: the parameters of ``forward`` and the example's form.

One table for the signature of a graph, for the guards in it, and for the errors of a call that is
outside of what was captured.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxshare.capture.call import IDS, MASK, Call
from fxshare.capture.containers import holds_tensor
from fxshare.capture.forms import (
    NONE,
    TENSOR,
    Form,
    Formless,
    form_of,
    matches,
    same,
    shown,
)
from fxshare.capture.guards import WAY_OUT, Default, not_as_captured
from fxshare.errors import CaptureError, GuardError

_CACHE_SWITCH = "use_cache"
_LITERALS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Parameter:
    """One parameter of ``forward``, or a keyword of the example that goes into its ``**kwargs``.

    ``default`` is the original's, :attr:`Default.OWN` where code cannot hold it, and its form None
    where it has none. ``captured`` is the form of the example's value, or of the default where the
    example left it out; ``given`` whether it did not.
    """

    name: str
    kind: int
    required: bool
    default: Any
    default_form: Form | None
    captured: Form | None
    given: bool

    @property
    def by_position(self) -> bool:
        """Whether a call may give it without its name."""
        return self.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )

    @property
    def is_input(self) -> bool:
        """Whether the graph reads it: there are tensors in it."""
        return self.given and self.captured is not None and _has_tensor(self.captured)

    @property
    def may_be_left_out(self) -> bool:
        """Whether the original without it does what was captured."""
        if not self.given:
            return True
        if self.required or self.default_form is None or self.captured is None:
            return False
        return same(self.default_form, self.captured)

    def accepts(self, value: object) -> bool:
        """Whether a value takes the path that was captured."""
        if value is Default.OWN:
            return self.may_be_left_out
        return self.captured is not None and matches(value, self.captured)


@dataclass(frozen=True)
class Contract:
    """``model`` is the name of the class; ``open`` whether it takes keywords that it does not name.
    A mask of ones stands for one that is left out where ``fills_mask``."""

    model: str
    parameters: tuple[Parameter, ...]
    open: bool
    fills_mask: bool

    @staticmethod
    def of(model: nn.Module, call: Call, *, fills_mask: bool = True) -> Contract:
        """The contract of a model that is captured with ``call``.

        Raises :class:`CaptureError` for an argument that a graph can neither take nor hold.
        """
        name = type(model).__name__
        found = inspect.signature(model.forward).parameters.values()
        named = {p.name: p for p in found if p.kind is not inspect.Parameter.VAR_POSITIONAL}
        rest = [n for n, p in named.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        for other in rest:
            del named[other]
        parameters = [_parameter(name, p, call) for p in named.values()]
        parameters += [_keyword(name, n, call[n]) for n in call if n not in named]
        mask, ids = call.get(MASK), call.get(IDS)
        alike = isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.ndim == ids.ndim
        return Contract(name, tuple(parameters), bool(rest), fills_mask and alike)

    def fills(self, name: str) -> bool:
        """Whether the graph makes up for the argument where it is left out, or None."""
        if name == _CACHE_SWITCH:
            return any(p.name == name and p.captured == ("value", False) for p in self.parameters)
        return (
            name == MASK
            and self.fills_mask
            and any(p.name == MASK and not p.required for p in self.parameters)
        )

    def check(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Hold a call to what was captured.

        Raises :class:`GuardError` naming the argument, what was captured, and the way out.
        """
        given = self._bound(args, kwargs)
        for parameter in self.parameters:
            name = parameter.name
            if name not in given:
                if not (parameter.may_be_left_out or self.fills(name)):
                    raise GuardError(self._missing(parameter))
            elif not (
                parameter.accepts(given[name]) or (given[name] is None and self._filled_mask(name))
            ):
                raise GuardError(refusal_of(parameter, given[name]))

    def _filled_mask(self, name: str) -> bool:
        return name == MASK and self.fills(MASK)

    def _bound(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
        names = [p.name for p in self.parameters if p.by_position]
        if len(args) > len(names):
            by_name = [p.name for p in self.parameters if not p.by_position]
            others = f"; it takes {', '.join(by_name)} by name" if by_name else ""
            raise GuardError(
                f"{self.model} was called with {len(args)} arguments by position, and its forward "
                f"takes {len(names)}: {', '.join(names) or 'none'}{others}"
            )
        given = dict(zip(names, args, strict=False))
        known = {p.name for p in self.parameters}
        for name, value in kwargs.items():
            if name in given:
                raise GuardError(
                    f"argument {name!r} of {self.model} was given twice, by position and by name; "
                    "give it once"
                )
            if name not in known:
                raise GuardError(self._unknown(name))
            given[name] = value
        return given

    def _unknown(self, name: str) -> str:
        if self.open:
            return (
                f"argument {name!r}: the model was captured without it, and the graph has no other "
                f"path; leave it out, or {WAY_OUT}"
            )
        names = [p.name for p in self.parameters]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{self.model} takes no argument {name!r}: its forward takes {names}{hint}"

    def _missing(self, parameter: Parameter) -> str:
        assert parameter.captured is not None
        captured = f"{parameter.name}={shown(parameter.captured)}"
        if parameter.required or parameter.default_form is None:
            return (
                f"argument {parameter.name!r} is missing: the model was captured with {captured}; "
                "give it"
            )
        default = (
            ""
            if parameter.default_form == NONE
            else (f", and without it {self.model} would take {shown(parameter.default_form)}")
        )
        return (
            f"argument {parameter.name!r} is missing: the model was captured with {captured}"
            f"{default}. Give it as captured, or {WAY_OUT}"
        )


def refusal_of(parameter: Parameter, value: object) -> str:
    """Why a value of an argument is none that the graph was captured for, and the way out."""
    name = parameter.name
    if value is None and parameter.is_input and parameter.captured == TENSOR:
        return (
            f"argument {name!r} is None, and the model was captured with a tensor; give one, or "
            f"{WAY_OUT}"
        )
    captured = shown(parameter.captured) if parameter.captured else "its own default"
    return not_as_captured(name, captured, value)


def _parameter(model: str, found: inspect.Parameter, call: Call) -> Parameter:
    name = found.name
    required = found.default is inspect.Parameter.empty
    default_form = None if required else _form_or_none(found.default)
    default = Default.OWN if required or not _is_writable(found.default) else found.default
    given = name in call
    captured = _form(model, name, call[name]) if given else default_form
    return Parameter(name, int(found.kind), required, default, default_form, captured, given)


def _keyword(model: str, name: str, value: object) -> Parameter:
    kind = int(inspect.Parameter.KEYWORD_ONLY)
    return Parameter(name, kind, False, Default.OWN, None, _form(model, name, value), True)


def _form(model: str, name: str, value: object) -> Form:
    try:
        form = form_of(value)
    except Formless as found:
        raise CaptureError(
            f"argument {name!r} of {model}: a graph can hold no guard on {found}; expected "
            "tensors, numbers, strings, and lists, tuples, dictionaries and data classes of these. "
            "Give one of these, or use capture='modules'"
        ) from found
    if _has_tensor(form) and not holds_tensor(value):
        raise CaptureError(
            f"argument {name!r} of {model}: a {type(value).__module__}."
            f"{type(value).__qualname__} holds tensors where no graph finds them; give them in a "
            "list, a tuple, a dictionary or a data class, or use capture='modules'"
        )
    return form


def _form_or_none(value: object) -> Form | None:
    try:
        form = form_of(value)
    except Formless:
        return None
    return None if _has_tensor(form) else form  # which tensor it is, a form does not say


def _is_writable(value: object) -> bool:
    if type(value) in (tuple, list):
        assert isinstance(value, (tuple, list))
        return all(_is_writable(item) for item in value)
    return type(value) in _LITERALS


def _has_tensor(form: Form) -> bool:
    return form == TENSOR or any(isinstance(part, tuple) and _has_tensor(part) for part in form)


__all__ = ["Contract", "Parameter", "refusal_of"]
