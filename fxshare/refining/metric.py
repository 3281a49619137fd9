"""What a block's error costs the model: the second moment of the loss's gradient at its output.

``F = E[∂L/∂h ∂L/∂hᵀ]`` of the dense model, by a backward pass on a few batches: half of
``E[eᵀ F e]`` is the second-order increase of the loss by an error e of the output h (Gauss-Newton,
as the planner has it for weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import float_leaves
from fxshare.calibration.distance import output_rows
from fxshare.calibration.losses import default_loss
from fxshare.capture import Call, device_of
from fxshare.capture.call import to_device
from fxshare.capture.steered import SteeredGraph
from fxshare.refining.cuts import Cuts
from fxshare.refining.measure import in_the_model
from fxshare.refining.objectives import Objective, Summed, ToOutputs
from passes.graph.graph import read_instead

_BATCHES = 4
_EVEN = 0.1
"""The share of the metric that weighs every direction alike: few tokens say nothing of most."""


class _Tap(nn.Module):
    """The identity, which adds up the second moment of the gradients on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.moment: Tensor | None = None
        self._call: Call = {}

    def begin(self, call: Call) -> None:
        """Say which call comes next."""
        self._call = call

    def forward(self, value: Any) -> Any:
        """``value``, differentiated."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        seen: Tensor = value.clone()  # the model may write into it, or a leaf
        seen.register_hook(self._add)  # type: ignore[no-untyped-call]
        return seen

    def _add(self, gradient: Tensor) -> None:
        for rows_ND in output_rows(gradient, self._call):
            moment_DD = rows_ND.double().mT @ rows_ND.double()
            self.moment = moment_DD if self.moment is None else self.moment + moment_DD


def metrics_of(
    dense: fx.GraphModule,
    cuts: Cuts,
    batches: Sequence[object],
    caller: Callable[[object], Call],
    seed: int,
) -> dict[str, Tensor]:
    """Roots R ``(D, D)`` of the metrics ``F = R Rᵀ`` of the blocks' outputs, by their names, each
    of trace D; what the loss does not depend on is in no metric."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(dense.graph, copied))
    taps: dict[str, _Tap] = {}
    places: list[str] = []
    for name in dict.fromkeys(name for block in cuts.blocks for name in block.outputs):
        (node,) = (new for old, new in copied.items() if old.name == name)
        taps[name] = _Tap()
        place = f"metric_{len(taps)}"
        while hasattr(dense, place):  # a module of the model's own
            place += "_"
        places.append(place)
        dense.add_module(place, taps[name])
        with graph.inserting_after(node):
            tap = graph.call_module(place, (node,))
        read_instead(node, tap)
    module = SteeredGraph(dense, graph).eval()
    generator = torch.Generator().manual_seed(seed)
    for batch in itertools.islice(batches, _BATCHES):
        call = to_device(caller(batch), device_of(dense))
        for tap_of in taps.values():
            tap_of.begin(call)
        with torch.enable_grad():
            with in_the_model("a batch"):
                output = module(**call)
            loss, _ = default_loss(output, call, generator=generator)
            loss.backward()  # type: ignore[no-untyped-call]
    for place in places:
        delattr(dense, place)
    found = {name: tap_of.moment for name, tap_of in taps.items()}
    return {name: _root(moment) for name, moment in found.items() if _counts(moment)}


def _counts(moment_DD: Tensor | None) -> bool:
    return (
        moment_DD is not None and bool(moment_DD.isfinite().all()) and bool(moment_DD.trace() > 0)
    )


def _root(moment_DD: Tensor | None) -> Tensor:
    assert moment_DD is not None
    size = len(moment_DD)
    even_DD = torch.eye(size, dtype=torch.float64, device=moment_DD.device)
    scaled_DD = moment_DD * (size / float(moment_DD.trace()))
    root_DD: Tensor = torch.linalg.cholesky((1 - _EVEN) * scaled_DD + _EVEN * even_DD)
    return root_DD


@dataclass(frozen=True, eq=False)
class InMetric(Objective):
    """Half the squared distance to the dense block's outputs, per row: in their metrics, and of an
    output without one as :class:`ToOutputs` has it. ``outputs`` are their names."""

    name: ClassVar[str] = "hidden"

    outputs: Sequence[str]
    metrics: Mapping[str, Tensor]
    """Roots as of :func:`metrics_of`."""

    def targets(self, output: Any, call: Call) -> list[Tensor]:
        return ToOutputs().targets(output, call)

    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        roots = [
            self.metrics.get(name)
            for name, value in zip(self.outputs, output, strict=True)
            for _ in float_leaves(value)
        ]
        own = list(output_rows(output, call))
        total, count, plain = own[0].new_zeros(()), 0, []
        for at, (own_ND, wanted_ND, root_DD) in enumerate(zip(own, targets, roots, strict=True)):
            if root_DD is None:
                plain.append(at)
                continue
            gap_ND = (own_ND - wanted_ND) @ root_DD.to(own_ND)
            total, count = total + 0.5 * gap_ND.pow(2).sum(), count + len(gap_ND)
        if plain:
            rest = ToOutputs().loss(
                [own[at] for at in plain], [targets[at] for at in plain], {}, batch
            )
            total, count = total + rest.total, count + rest.count
        return Summed(total, count)


__all__ = ["InMetric", "metrics_of"]
