"""The example of a capture: made into a call, and what it lets a graph be called with."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from fxshare.base.numerics import tolerance, worst
from fxshare.base.placement import dtype_of
from fxshare.capture.call import IDS, LABELS, MASK, Call, parameters_of, resized
from fxshare.capture.caller import Caller
from fxshare.capture.check import Original
from passes import is_linear

_ROWS, _POSITIONS = 2, 8


def example_call(model: nn.Module, example: object, run: Original) -> tuple[Call, bool]:
    """The example as a call, and whether a mask of ones stands for one that is left out.

    For a language model of transformers it does, and one is filled in. Where the model means
    another thing by no mask, the example is taken as it is.
    """
    as_it_is = Caller(model, LABELS, mask=False)(example)  # one with labels wants the loss
    call = Caller(model, LABELS)(example)
    if run.is_meta or not isinstance(call.get(MASK), Tensor) or not _may_be_left_out(model):
        return call, True
    alike = _alike(call, run, tolerance(dtype_of(model), 1 + sum(map(is_linear, model.modules()))))
    return (call if alike or as_it_is.get(MASK) is not None else as_it_is), alike


def hooks_of(model: nn.Module) -> str | None:
    """Why no graph is made of a model that has forward hooks itself; None where it has none."""
    for what, hooks in (
        ("pre-hook", model._forward_pre_hooks),
        ("hook", model._forward_hooks),
    ):
        for hook in hooks.values():
            name = f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', hook)}"
            return (
                f"{type(model).__name__} itself has a forward {what} ({name}), which no graph "
                "holds: it stays with capture='modules'; to have a graph, remove it "
                "(handle.remove()) and register it on the result"
            )
    return None


def _may_be_left_out(model: nn.Module) -> bool:
    mask = parameters_of(model).get(MASK)
    return mask is not None and mask.default is not inspect.Parameter.empty


def _alike(call: Call, run: Original, limit: float) -> bool:
    """Whether the model gives the same without a mask as with one of ones; so it is where it takes
    no call without one."""
    if not isinstance(call.get(IDS), Tensor):
        return False
    short = resized(call, batch=min(_ROWS, call[IDS].shape[0]))
    if call[IDS].ndim > 1:
        short = resized(short, sequence=min(_POSITIONS, call[IDS].shape[1]))
    for tried in (short, call):
        without = {name: value for name, value in tried.items() if name != MASK}
        with_ones = {**tried, MASK: tried[IDS].new_ones(tried[IDS].shape)}
        if not run.works(without):
            continue
        expected = run(without)
        return run.works(with_ones) and worst(expected, run(with_ones)).relative <= limit
    return True


__all__ = ["example_call", "hooks_of"]
