"""What a compiled model knows about itself: ``gm.fxshare``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxshare.capture import Caller, FrontEnd
from fxshare.capture.call import MASK, Call, Shapes
from fxshare.capture.containers import mapped
from fxshare.config import ShareConfig
from fxshare.models.source import Source
from fxshare.plans.plan import Plan
from fxshare.result.inputs import InputSpec
from fxshare.result.refinement import Refinement
from fxshare.result.report import Report
from passes import Origin
from passes.graph.slices import Slice
from passes.pipeline import Prefer

Step = Literal["memory", "speed", "readable"]


@dataclass(frozen=True, eq=False)
class Readable:
    """The graph that a lowered one was made from: ``graph`` without values in its tensors, and
    where each of its linears is in the lowered graph (:class:`passes.Origin`); one that is not
    among the ``origins`` is there under its own name."""

    graph: fx.GraphModule
    origins: Mapping[str, Origin]


@dataclass(frozen=True, eq=False)
class Lowered:
    """How a module was lowered.

    ``graphs`` are the readable graphs by the name of the module that each was; the whole has the
    empty name. ``slices`` are the places of the slices in the readable module.
    """

    prefer: Prefer
    graphs: Mapping[str, Readable]
    slices: Mapping[str, Slice]
    dense: tuple[str, ...] = ()
    """The groups that were multiplied out."""
    written_out: tuple[str, ...] = ()
    """The groups whose bases are whole now and were not (:class:`passes.WriteOutPivots`)."""
    frozen: tuple[str, ...] = ()
    """The parameters of the readable module that took no gradient: they were packed apart."""


@dataclass(frozen=True)
class Record:
    """The plan, the report, and where everything is.

    ``slice_errors`` are ``‖W − C B‖_F / ‖W‖_F`` per slice as they were when factorised, so that a
    rewrite that wired the wrong basis can be told from one that is merely lossy.
    ``bias_shifts`` are ``‖b' − b‖`` per slice whose bias took up the mean of what was lost.
    ``other_shifts`` are ``‖p' − p‖`` per parameter outside of every slice that refining trained.
    ``refined`` says what refining did, one entry a run.
    ``inputs`` are the two example calls as specs (names to :class:`InputSpec` or constants).
    ``fills_mask`` says whether a mask of ones stands for an attention mask that is left out.
    ``lowering`` is how the graph was lowered (``"memory"``, ``"speed"``) or made readable again
    (``"readable"``), one step after the other, and ``lowered`` what the last one made, where the
    module is lowered now.
    ``frozen`` are the parameters of the original that took no gradient when it was compiled, and
    ``frozen_when_lowered`` those of the readable module when it was lowered last: what is frozen is
    not packed with what is trainable. None where a folder of an earlier version does not say it.
    ``extra_passes`` names the passes that are not ours; ``graph_sha256`` is the result's, see
    :func:`graph_sha256`.
    """

    config: ShareConfig
    plan: Plan
    report: Report
    front_end: FrontEnd
    source: Source
    relaxed: tuple[int, ...] = ()
    slice_errors: Mapping[str, float] = field(default_factory=dict)
    bias_shifts: Mapping[str, float] = field(default_factory=dict)
    other_shifts: Mapping[str, float] = field(default_factory=dict)
    refined: tuple[Refinement, ...] = ()
    inputs: tuple[Mapping[str, Any], ...] = ()
    fills_mask: bool = True
    extra_passes: tuple[str, ...] = ()
    graph_sha256: str = ""
    lowering: tuple[Step, ...] = ()
    lowered: Lowered | None = None
    frozen: tuple[str, ...] | None = None
    frozen_when_lowered: tuple[str, ...] | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the example call by name; none where there was no example."""
        return tuple(self.inputs[0]) if self.inputs else ()

    def caller(self, model: nn.Module) -> Caller:
        """Makes calls of ``model`` like the example."""
        if not self.inputs:
            return Caller(model)
        base = self.inputs[0]
        options = {name: value for name, value in base.items() if not _holds_spec(value)}
        return Caller(model, self.arguments, mask=MASK in base, options=options)

    @staticmethod
    def specs(shapes: Shapes | None) -> tuple[Mapping[str, Any], ...]:
        """The example calls as specs."""
        if shapes is None:
            return ()
        calls = [shapes.base] if shapes.other is None else [shapes.base, shapes.other]
        return tuple(
            {name: mapped(Tensor, InputSpec.of, value) for name, value in call.items()}
            for call in calls
        )

    def random_call(self, number: int, *, seed: int, device: torch.device) -> Call:
        """A random call of the form of example ``number``."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: mapped(InputSpec, lambda spec: spec.random(generator, device), value)
            for name, value in self.inputs[number].items()
        }


def _holds_spec(value: object) -> bool:
    found: list[InputSpec] = []
    mapped(InputSpec, found.append, value)
    return bool(found)
