"""The switch of a model's cache, also where ``forward`` takes it among any other keywords."""

from __future__ import annotations

import inspect

from torch import nn

from fxshare.capture.call import Call

SWITCH = "use_cache"


def without_cache(model: nn.Module, call: Call) -> Call:
    """The call with the cache off: a cache in the output is no tensor, and no graph returns it.

    GraniteMoE, LLaVA and every model of PEFT hand ``use_cache`` on in ``**kwargs``; that it arrives
    is told by a module inside which names it.
    """
    if SWITCH in call or not _hands_on(model):
        return call
    return {**call, SWITCH: False}


def _hands_on(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    if SWITCH in parameters:
        return True
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return False
    # a leaf has no cache to switch off
    inner = (module for module in model.modules() if module._modules and module is not model)
    return any(map(_names_it, inner))


def _names_it(module: nn.Module) -> bool:
    try:
        return SWITCH in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward that Python cannot look into
        return False


__all__ = ["SWITCH", "without_cache"]
