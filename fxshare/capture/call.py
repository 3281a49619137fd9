"""Example calls: bound to the names of ``forward``, and varied in batch and sequence length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxshare.capture.containers import holds_tensor, leaves, mapped
from fxshare.errors import CalibrationError

Call = Mapping[str, Any]
"""One call of a model: values by parameter name, in the order of ``forward``'s signature."""
IDS = "input_ids"
MASK = "attention_mask"
LABELS = frozenset({"labels", "label", "targets", "target"})
_KINDS_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The named parameters of ``model.forward``; ``*args`` and ``**kwargs`` are left out."""
    found = inspect.signature(model.forward).parameters
    return {name: p for name, p in found.items() if p.kind in _KINDS_BY_NAME}


def _takes_any_keyword(model: nn.Module) -> bool:
    found = inspect.signature(model.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found)


def bind(model: nn.Module, batch: object) -> Call:
    """Bind a batch to parameter names: a tensor is the first argument, a tuple or list the first
    ones, a mapping goes by name.

    Raises :class:`CalibrationError` naming the entry that ``forward`` does not take.
    """
    names = list(parameters_of(model))
    _check_by_name(model)
    if isinstance(batch, Mapping):
        unknown = [k for k in batch if k not in names]
        if unknown and not _takes_any_keyword(model):
            raise CalibrationError(_unknown(model, str(unknown[0]), names))
        return _plain({k: batch[k] for k in [n for n in names if n in batch] + unknown})
    values = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(values) > len(names):
        raise CalibrationError(_too_many(model, len(values), names))
    if not holds_tensor(values):
        raise CalibrationError(
            f"expected a batch as a tensor, a tuple of tensors or a mapping of tensors, found "
            f"{type(batch).__name__}"
        )
    return _plain(dict(zip(names, values, strict=False)))


def _plain(call: Call) -> Call:
    """The call with numpy's scalars as numbers, which graphs and folders can hold."""
    kind: Any = np.generic
    plain: Call = mapped(kind, lambda scalar: scalar.item(), dict(call))
    return plain


def _check_by_name(model: nn.Module) -> None:
    """A call goes by name throughout, so that labels can be left out and a mask filled in."""
    for name, found in inspect.signature(model.forward).parameters.items():
        required = found.default is inspect.Parameter.empty
        if found.kind is inspect.Parameter.POSITIONAL_ONLY and required:
            raise CalibrationError(
                f"{type(model).__name__}.forward takes {name!r} by position only, and an example "
                "or a batch goes by name; put the model into a module whose forward has names "
                "(without '/'), or use capture='modules' without example and data"
            )


def _unknown(model: nn.Module, entry: str, names: list[str]) -> str:
    rest = _rest(model, names)
    if rest is not None:
        return f"a batch has the entry {entry!r}, but {rest}"
    one = f"; a dictionary that is one argument is given as {{{names[0]!r}: ...}}" if names else ""
    return (
        f"a batch has the entry {entry!r}, but {type(model).__name__}.forward takes {names}; "
        f"drop the entry or rename it{one if len(names) == 1 else ''}"
    )


def _rest(model: nn.Module, names: list[str]) -> str | None:
    """What ``forward`` takes as ``*xs``, and the way out; None where it takes nothing so."""
    found = inspect.signature(model.forward).parameters.values()
    rest = next((p.name for p in found if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    if rest is None:
        return None
    taken = f"{names} by name and the rest" if names else "all of its inputs"
    return (
        f"{type(model).__name__}.forward takes {taken} as *{rest}, by position, and an example or "
        "a batch goes by name; put the model into a module whose forward names its arguments, or "
        "use capture='modules' without example and data"
    )


def _too_many(model: nn.Module, count: int, names: list[str]) -> str:
    found = inspect.signature(model.forward).parameters
    entries = f"a batch has {count} {'entry' if count == 1 else 'entries'}, but"
    text = f"{entries} {type(model).__name__}.forward takes {names}"
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()) and not names:
        inner = dict(model.named_children())
        inside = f", or compile what is inside (model.{next(iter(inner))})" if inner else ""
        return f"{text} and says no names; give a dictionary by the names of the inputs{inside}"
    rest = _rest(model, names)
    if rest is not None:
        return f"{entries} {rest}"
    if len(names) == 1:
        return f"{text}; a list or tuple that is one argument is given as {{{names[0]!r}: ...}}"
    return text


def as_called(model: nn.Module, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as users give them, the first ones by position: hooks on a model see those."""
    given = dict(call)
    leading = []
    for name, parameter in parameters_of(model).items():
        if name not in given or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            break
        leading.append(given.pop(name))
    return leading, given


def without_labels(model: nn.Module, call: Call, keep: Iterable[str] = ()) -> Call:
    """The call without optional labels but those of ``keep``, so that the captured graph returns
    what inference needs."""
    parameters = parameters_of(model)
    return {
        name: value
        for name, value in call.items()
        if not (
            name in LABELS
            and name not in keep
            and name in parameters
            and parameters[name].default is not inspect.Parameter.empty
        )
    }


def completed(model: nn.Module, call: Call, *, mask: bool = True) -> Call:
    """The call with what a Hugging Face model would fill in: an attention mask of ones, unless
    that is to be left out, and no cache (the graph of a plain call has none)."""
    parameters = parameters_of(model)
    ids = call.get(IDS)
    filled = dict(call)
    if mask and MASK in parameters and isinstance(ids, Tensor) and filled.get(MASK) is None:
        filled[MASK] = torch.ones_like(ids)
    if "use_cache" in parameters:
        filled.setdefault("use_cache", False)
    return {k: filled[k] for k in [*(n for n in parameters if n in filled), *call] if k in filled}


def padded(call: Call) -> Call:
    """The call with the last position of its first row masked out, where it has a mask: a graph
    that took a short cut for masks of ones shows it here."""
    mask = call.get(MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type == "meta":
        return call
    mask = mask.clone()
    mask[0, -1] = 0
    return {**call, MASK: mask}


def tensors(call: Call) -> list[Tensor]:
    """Every tensor of the call, nested ones included."""
    return [v for v in leaves(dict(call)) if isinstance(v, Tensor)]


def as_float32(call: Call) -> Call:
    """A call whose numbers are in float32, for a copy that computes in it."""
    wide: Call = mapped(Tensor, lambda t: t.float() if t.is_floating_point() else t, dict(call))
    return wide


def to_device(call: Call, device: torch.device) -> Call:
    """The call with every tensor on ``device``."""
    moved: Call = mapped(Tensor, lambda t: t.to(device), dict(call))
    return moved


@dataclass(frozen=True)
class Shapes:
    """Two calls that differ in size, and along which dimensions they differ."""

    base: Call
    other: Call | None
    batch: bool
    sequence: bool

    @staticmethod
    def between(base: Call, other: Call | None) -> Shapes:
        """Two calls that are known to work; what differs between them varies."""
        batch, length = _sizes(base)
        other_batch, other_length = _sizes(base if other is None else other)
        return Shapes(base, other, batch=batch != other_batch, sequence=length != other_length)

    def dynamic_dims(self, value: Tensor) -> tuple[int, ...]:
        """The dimensions of one of the base call's tensors that are meant to vary."""
        size, length = _sizes(self.base)
        dims = []
        if self.batch and value.ndim >= 1 and value.shape[0] == size:
            dims.append(0)
        if self.sequence and value.ndim >= 2 and value.shape[1] == length:
            dims.append(1)
        return tuple(dims)


def _sizes(call: Call) -> tuple[int, int | None]:
    shaped = [t for t in tensors(call) if t.ndim >= 1]
    batch = shaped[0].shape[0] if shaped else 0
    length = next((t.shape[1] for t in shaped if t.ndim >= 2), None)
    return batch, length


def resized(call: Call, *, batch: int | None = None, sequence: int | None = None) -> Call:
    """The call with another batch size or sequence length: rows are cut, or repeated in turn."""
    size, length = _sizes(call)

    def resize(t: Tensor) -> Tensor:
        if batch is not None and t.ndim >= 1 and t.shape[0] == size:
            t = _take(t, 0, batch)
        if sequence is not None and t.ndim >= 2 and t.shape[1] == length:
            t = _take(t, 1, sequence)
        return t

    changed: Call = mapped(Tensor, resize, dict(call))
    return changed


def _take(t: Tensor, dim: int, new: int) -> Tensor:
    if t.device.type == "meta":
        shape = list(t.shape)
        shape[dim] = new
        return torch.empty(shape, dtype=t.dtype, device="meta")
    return t.index_select(dim, torch.arange(new, device=t.device) % t.shape[dim])


_MOST_ROWS, _MOST_POSITIONS = 3, 24


def vary(call: Call, works: Callable[[Call], bool]) -> Shapes:
    """Find two calls of different batch size and sequence length that the model accepts.

    ``works`` tries one on the original model. The base call is the user's, cut to a few rows and
    positions where the model accepts that, so that a self-check stays cheap; a batch or sequence of
    one is never used, because broadcasting would hide what depends on it.
    """
    size, length = _sizes(call)
    small = resized(
        call,
        batch=min(max(size, 2), _MOST_ROWS),
        sequence=None if length is None else min(max(length, 4), _MOST_POSITIONS),
    )
    base = next((c for c in (small, resized(call, batch=max(size, 2)), call) if works(c)), call)
    size, length = _sizes(base)
    changed_batch = resized(base, batch=size + 1)
    shorter = None if length is None or length < 3 else length - 1
    if shorter is not None:
        both = padded(resized(changed_batch, sequence=shorter))
        if works(both):
            return Shapes(base, both, batch=True, sequence=True)
    if works(changed_batch):
        return Shapes(base, changed_batch, batch=True, sequence=False)
    if shorter is not None:
        only_length = resized(base, sequence=shorter)
        if works(only_length):
            return Shapes(base, only_length, batch=False, sequence=True)
    return Shapes(base, None, batch=False, sequence=False)
