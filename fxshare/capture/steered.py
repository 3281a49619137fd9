"""A graph module that keeps what is no value: its modes after an error, the modules that stay in
eval mode, and that it holds eval mode alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from fxshare.errors import CaptureError, GuardError
from passes.graph.modes import DEVICES, caller_modes, is_steered, set_modes

_GraphT = TypeVar("_GraphT", bound="SteeredGraph")
_HELD = "held_training"
_EVAL_ONLY = "eval_only"
_PLAIN = "no_autocast"
_STEERED = "steered"
_CODELESS = "_without_code"


class SteeringDiffers(CaptureError):
    """A graph computes what the model does, and has other gradients or another training mode."""


class SteeredGraph(fx.GraphModule):
    """A captured graph, or one that was made of it.

    Modules that the model's own ``train`` or ``forward`` keeps in one mode (frozen normalisation)
    stay in it, whatever ``train`` is told.
    """

    def __init__(
        self, root: Any, graph: fx.Graph, class_name: str = "GraphModule", *, code: bool = True
    ) -> None:
        """Without ``code`` it cannot be called before ``recompile()``: for a graph that is changed
        first, or only read."""
        self.__dict__[_CODELESS] = not code
        super().__init__(root, graph, class_name)
        del self.__dict__[_CODELESS]
        if is_steered(graph):  # asked at every call, and torch.compile cannot look into a graph
            self.meta[_STEERED] = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self.meta.get(_EVAL_ONLY)
        if reason is not None and self.training:
            raise GuardError(
                f"the graph holds eval mode alone: {reason}. Call .eval() first (gradients are "
                "there in eval mode too), or use capture='modules', which keeps the model's own "
                "training mode"
            )
        if _PLAIN in self.meta and any(map(torch.is_autocast_enabled, DEVICES)):
            raise GuardError(
                f"under autocast the model takes another path ({self.meta[_PLAIN]}) than the graph "
                "has; call it outside of autocast, or use capture='modules', which follows every "
                "path"
            )
        if _STEERED not in self.meta:
            return super().__call__(*args, **kwargs)
        caller = caller_modes()
        try:
            return super().__call__(*args, **kwargs)
        finally:  # an error may come from the middle of a region
            set_modes(caller)

    def recompile(self) -> PythonCode:
        """Write the code of the graph."""
        if self.__dict__.get(_CODELESS):
            return PythonCode("", {}, None)
        return super().recompile()

    def train(self: _GraphT, mode: bool = True) -> _GraphT:
        """Set the mode of every module but those that are held."""
        set_training(self, mode)
        return self


def set_training(gm: nn.Module, mode: bool) -> None:
    """Set the mode of every module of a graph, and of those that are held their own."""
    for module in gm.modules():  # GraphModules of torch.export refuse to be told by train()
        module.training = mode
    held: Mapping[str, tuple[bool, bool]] = getattr(gm, "meta", {}).get(_HELD, {})
    known = dict(gm.named_modules()) if held else {}
    for name, (evaluated, trained) in held.items():
        if name in known:
            known[name].training = trained if mode else evaluated


def hold_training(gm: fx.GraphModule, held: Mapping[str, tuple[bool, bool]]) -> None:
    """Hold the modules of these names in a mode of their own: in eval mode, and in training."""
    if held:
        gm.meta[_HELD] = dict(held)


def hold_eval(gm: fx.GraphModule, reason: str) -> None:
    """Let the graph refuse calls in training mode."""
    gm.meta[_EVAL_ONLY] = reason


def release_eval(gm: fx.GraphModule) -> None:
    """Let the graph be called in training mode again: it was seen to do there what it should."""
    gm.meta.pop(_EVAL_ONLY, None)


def hold_plain(gm: fx.GraphModule, reason: str) -> None:
    """Let the graph refuse calls under autocast."""
    gm.meta[_PLAIN] = reason


def eval_only(gm: fx.GraphModule) -> str | None:
    """Why the graph holds eval mode alone; None where it holds both."""
    found: str | None = gm.meta.get(_EVAL_ONLY)
    return found
