"""Modules around a model: taken off where they change nothing about what it computes, refused by
name where they do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fxshare.errors import CaptureError

T = TypeVar("T")
# by name: none of these is imported for the sake of models that have none
_AROUND: Mapping[str, str] = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
"""Classes that call the one module they hold as they are called, and where they hold it."""
_WHOLE = (
    "gather the whole weights into a model that is not wrapped "
    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and "
    "compile that"
)
_REFUSED: Mapping[str, str] = {
    "ScriptModule": (
        "TorchScript, which holds code and no modules to rewrite; compile the nn.Module that it "
        "was scripted or traced from"
    ),
    "FullyShardedDataParallel": f"sharded over processes; {_WHOLE}",
    "FSDPModule": f"sharded over processes; {_WHOLE}",
    "DeepSpeedEngine": (
        "an engine for training; compile its module (engine.module), with whole weights where "
        "ZeRO sharded them"
    ),
}
"""Classes that nothing is to be taken out of, by the names that their packages give them."""


def unwrapped(model: T) -> T:
    """The model inside of ``torch.compile``, ``DataParallel`` and the like; what is no wrapper, or
    no module, as it is.

    Raises :class:`CaptureError` naming the wrapper that cannot be taken off, and the way out.
    """
    found: Any = model
    while isinstance(found, nn.Module):
        _refuse(found)
        inner = _inner(found)
        if inner is None:
            break
        found = inner
    result: T = found
    return result


def _refuse(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            # TorchScript inside a model is a leaf like any other
            if cls.__name__ not in _REFUSED or (path and cls.__name__ == "ScriptModule"):
                continue
            where = f"its module {path!r} is" if path else "is"
            raise CaptureError(
                f"{type(model).__name__} cannot be compiled: {where} "
                f"a {cls.__name__}: {_REFUSED[cls.__name__]}"
            )
    _refuse_patched(model)


def _refuse_patched(model: nn.Module) -> None:
    """A function put in place of ``forward`` may reach the model through its closure; what is
    called in a copy would then be the original, whatever became of the copy."""
    own = vars(model).get("forward")
    if own is None or _is_wrapper(model) or _of_itself(own, model):
        return
    raise CaptureError(
        f"{type(model).__name__}.forward was replaced on the instance by "
        f"{getattr(own, '__qualname__', type(own).__name__)!r}, and a copy of the model would call "
        "the original through it; define forward in a class of your own and compile that, or put "
        "the original's back (del model.forward)"
    )


def _of_itself(own: Any, model: nn.Module) -> bool:
    """Whether a copy of the model has the function as its own: it holds the model by itself."""
    while isinstance(own, functools.partial):
        if any(value is model for value in (*own.args, *own.keywords.values())):
            return True
        own = own.func
    return inspect.ismethod(own) and own.__self__ is model


def _is_wrapper(model: nn.Module) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" in _AROUND for c in type(model).__mro__)


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper calls; None where the model is none."""
    for cls in type(model).__mro__:
        attribute = _AROUND.get(f"{cls.__module__}.{cls.__qualname__}")
        if attribute is None:
            continue
        inner = getattr(model, attribute)
        reason = _own_work(model, cls)
        if reason is not None:
            raise CaptureError(
                f"{type(model).__name__} around {type(inner).__name__} {reason}; compile what is "
                f"inside (model.{attribute}) if that is to be left out"
            )
        assert isinstance(inner, nn.Module)
        return inner
    return None


def _own_work(model: nn.Module, cls: type) -> str | None:
    """What a wrapper does beside calling what is inside; None for nothing."""
    if type(model).forward is not cls.forward:  # type: ignore[attr-defined]
        return "has a forward of its own"
    if model._forward_hooks or model._forward_pre_hooks:
        return "has forward hooks"
    if getattr(model, "mixed_precision", None) is not None:
        return "casts to another precision"
    return None


__all__ = ["unwrapped"]
