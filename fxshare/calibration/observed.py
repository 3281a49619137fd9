"""Statistics of a captured graph: observers are inserted, batches run, sums kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.base.placement import dtype_of
from fxshare.calibration.again import elementwise_again
from fxshare.calibration.gradients import GradientTap, is_diagonal, is_projected
from fxshare.calibration.gram import GramAccumulator, sums_dtype
from fxshare.calibration.lookups import LookupStatistics, RowCounter
from fxshare.capture import Captured
from fxshare.capture.call import MASK, Call
from fxshare.capture.guards import ones_if_missing
from fxshare.capture.steered import set_training
from fxshare.errors import CalibrationError
from fxshare.sites.site import Site, SliceSpec
from passes import (
    ObserveGradients,
    ObserveInputs,
    ObserveLookups,
    Pass,
    observed,
    observed_lookups,
    run,
    tapped,
)


class InputObserver(nn.Module):
    """Adds the rows it sees to a Gram matrix; rows of masked tokens are left out."""

    def __init__(self, features: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gram = GramAccumulator(features, dtype=dtype)
        self.unmasked = False

    @property
    def tokens(self) -> int:
        """Rows that went into the Gram."""
        return self.gram.tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in ``x`` ``(..., features)``; ``mask`` ``(batch, sequence)`` is 0 at padding."""
        rows = x.numel() // max(x.shape[-1], 1)
        if mask is not None and mask.numel() != rows:
            # not one row a token (pooled outputs, routed experts): nothing says which to leave out
            self.unmasked = True
            mask = None
        self.gram.add(x, None if mask is None else mask.bool())


class TokenCounter(nn.Module):
    """Counts the rows that an :class:`InputObserver` in its place would take in."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.tokens = 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """See ``x`` ``(..., features)``, of which rows where ``mask`` is 0 do not count."""
        rows = x.numel() // max(x.shape[-1], 1)
        masked = mask is not None and mask.numel() == rows
        self.tokens += int(mask.bool().sum()) if masked and mask is not None else rows


Counting = InputObserver | TokenCounter | RowCounter
"""What counts tokens."""


_ROWS = "rows"


def _lookup_tap(width: int) -> GradientTap:
    return GradientTap([SliceSpec(name=_ROWS, start=0, stop=width)])


def tap_of(site: Site, weight_OI: Tensor, dtype: torch.dtype) -> GradientTap:
    """The tap for the gradients at a site's output, summed up in a dtype: per slice a Gram, its
    diagonal where :func:`is_diagonal` says so, or seen through the weight where
    :func:`is_projected` does."""
    diagonal = {s.name for s in site.slices if is_diagonal(site, s)}
    projected = {s.name: weight_OI[s.start : s.stop] for s in site.slices if is_projected(site, s)}
    return GradientTap(site.slices, diagonal, projected, dtype)


def _freeze(copy: nn.Module) -> None:
    """Have the matrices of a structure copy ask for no gradient, in the same memory: of one that
    does autograd keeps what it is multiplied by, for a product that nobody wants."""
    looked_up = {id(m.weight) for m in copy.modules() if isinstance(m, nn.Embedding)}
    frozen: dict[int, nn.Parameter] = {}
    for module in copy.modules():
        for name, one in module._parameters.items():
            if one is None or one.ndim < 2 or not one.requires_grad or id(one) in looked_up:
                continue  # what is left says that a loss depends on the model where no tap does
            if id(one) not in frozen:
                frozen[id(one)] = nn.Parameter(one.detach(), requires_grad=False)
            module._parameters[name] = frozen[id(one)]


class GraphStage:
    """The captured graph with observers in it."""

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[Site],
        weights: Mapping[str, Tensor],
        *,
        gradients: bool,
        counted: Sequence[Site] = (),
        offload: bool = False,
    ) -> None:
        called = {name: site for site in sites for name in site.calls}
        looked_up = tuple(name for site in sites for name in site.lookups)
        nodes = {str(n.target): n.name for n in captured.graph.graph.nodes if n.op == "placeholder"}
        filled = [n.name for n in captured.graph.graph.nodes if n.target is ones_if_missing]
        mask = filled[0] if filled else nodes.get(MASK)
        also = tuple(name for site in counted for name in site.calls)
        dtype = sums_dtype(dtype_of(captured.model))
        observer = partial(InputObserver, dtype=dtype)
        stages: list[Pass] = [
            # who is only counted first: the graph tells of the last that observed
            ObserveInputs(sites=also, new_observer=TokenCounter, mask=mask),
            ObserveInputs(sites=tuple(called), new_observer=observer, mask=mask),
            ObserveLookups(
                sites=looked_up,
                new_counter=RowCounter,
                new_tap=_lookup_tap if gradients else None,
                mask=mask,
            ),
        ]
        if gradients:

            def new_tap(name: str) -> GradientTap:
                return tap_of(called[name], weights[called[name].name], dtype)

            stages.append(ObserveGradients(sites=tuple(called), new_tap=new_tap, mask=mask))
        self.contract = captured.contract
        self.gm, _ = run(captured.graph, stages)
        _freeze(self.gm)
        set_training(self.gm, False)
        # where a file holds what is saved, less of it would be in memory
        self._running = elementwise_again(self.gm) if gradients and not offload else self.gm
        self.seen = observed(self.gm)
        self.tapped = tapped(self.gm)
        self.taps = {n: m for n, m in self.gm.named_children() if isinstance(m, GradientTap)}
        self.names = set(nodes)
        self.observers = {
            name: m for name, m in self.gm.named_children() if isinstance(m, InputObserver)
        }
        counters = [m for m in self.gm.children() if isinstance(m, (RowCounter, TokenCounter))]
        self.counting: list[Counting] = [*self.observers.values(), *counters]
        self.looked_up = {
            name: tuple(self._lookup(*both) for both in found)
            for name, found in observed_lookups(self.gm).items()
        }

    def _lookup(self, counter: str, tap: str | None) -> LookupStatistics:
        counted = self.gm.get_submodule(counter)
        assert isinstance(counted, RowCounter)
        if tap is None:
            return LookupStatistics(counted, None)
        gradient = self.taps[tap].grams[_ROWS]
        assert isinstance(gradient, GramAccumulator)
        return LookupStatistics(counted, gradient)

    @property
    def module(self) -> nn.Module:
        """What is run."""
        return self._running

    def __call__(self, call: Call) -> Any:
        unknown = sorted(set(call) - self.names)
        if unknown:
            raise CalibrationError(
                f"a calibration batch has {unknown[0]!r}, which the captured call had not; give "
                "batches of one form, or example=... with every argument"
            )
        if self.contract is not None:
            self.contract.check((), call)
        return self._running(**call)

    def close(self) -> None:
        """Nothing to take down: the observed graph is our own."""
