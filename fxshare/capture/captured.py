"""What capture hands on: a graph, how it was made, and the calls it was checked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from fxshare.base.randomness import own_randomness
from fxshare.capture.call import MASK, Call, Shapes, as_called
from fxshare.capture.caller import Caller
from fxshare.capture.containers import holds_tensor
from fxshare.capture.contract import Contract
from fxshare.capture.switches import SWITCH

FrontEnd = Literal["fx", "export", "modules"]
Mode = Literal["auto", "fx", "export", "modules"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    ``model`` is what was captured; ``graph`` is what passes rewrite, for the modules front end all
    linears side by side. ``shapes`` are the calls it was checked on; ``relaxed`` the numbers of the
    guards that proved harmless; ``error`` the largest relative difference from the original in the
    self-check, None where nothing was run (meta device, modules). ``contract`` is what the
    graph may be called with, None where the model's own code is called.
    """

    model: nn.Module
    front_end: FrontEnd
    graph: fx.GraphModule
    shapes: Shapes | None
    relaxed: tuple[int, ...]
    error: float | None
    notes: tuple[str, ...]
    seconds: float
    contract: Contract | None = None
    wide: bool = False
    """Whether a graph of a model in half precision computes in float32."""

    @property
    def caller(self) -> Caller:
        """Makes a call of a batch: ``captured.caller(batch)``. Labels stay in it where the capture
        saw them; a mask, and options that are no tensors, are filled in where it had them."""
        if self.shapes is None:
            return Caller(self.model, wide=self.wide)
        base = self.shapes.base
        options = {name: value for name, value in base.items() if not holds_tensor(value)}
        return Caller(
            self.model,
            tuple(base),
            mask=MASK in base,
            options=options,
            cache_off=SWITCH in base,
            wide=self.wide,
        )

    @property
    def side_by_side(self) -> bool:
        """Whether the graph is the model's linears side by side (:mod:`fxshare.capture.modules`).
        Such a graph shows weights and computes nothing: the model's own code runs them."""
        return self.front_end == "modules"

    @property
    def module(self) -> nn.Module:
        """What computes the model's function: the graph, or where that is none, the model."""
        return self.model if self.side_by_side else self.graph

    def computing(self, module: nn.Module) -> Captured:
        """The same capture with another :attr:`module`, a copy with other weights say."""
        if self.side_by_side:
            return replace(self, model=module)
        assert isinstance(module, fx.GraphModule)
        return replace(self, graph=module)

    def run(self, call: Call) -> Any:
        """The output of :attr:`module` for a call (see :attr:`caller`)."""
        if self.contract is not None:
            self.contract.check((), call)
            return self.module(**call)
        args, kwargs = as_called(self.model, call)
        return self.module(*args, **kwargs)


@contextmanager
def quiet(seed: int | None = None) -> Iterator[None]:
    """No gradients, and random numbers of our own, from ``seed`` on where it is given."""
    with own_randomness(seed), torch.no_grad():
        yield


__all__ = ["Captured", "FrontEnd", "Mode", "quiet"]
