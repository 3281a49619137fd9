"""What a compiled model knows about itself: ``gm.fxshare``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture.call import Call, Shapes
from fxshare.capture.modules_front_end import module_slices
from fxshare.config import ShareConfig
from fxshare.errors import FxShareError
from fxshare.plans import Plan
from fxshare.report import Report
from fxshare.source import Source
from passes.graph import weight_and_bias
from passes.slices import Slice


@dataclass(frozen=True)
class InputSpec:
    """Shape, dtype and range of one example tensor; enough to make another like it."""

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float

    @staticmethod
    def of(t: Tensor) -> InputSpec:
        """The spec of a tensor; on the meta device its range is 0 to 1."""
        known = t.device.type != "meta" and t.numel() > 0
        low, high = (float(t.min()), float(t.max())) if known else (0.0, 1.0)
        return InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."), low, high)

    def random(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Uniform numbers in the range, of the shape and dtype. A range of one value stays."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return (self.low + unit * (self.high - self.low)).to(device=device, dtype=dtype)
        low, high = int(self.low), int(self.high)
        return torch.randint(low, high + 1, self.shape, generator=generator).to(
            device=device, dtype=dtype
        )


@dataclass(frozen=True)
class Record:
    """The plan, the report, and where everything is.

    ``slice_errors`` are ``‖W − C B‖_F / ‖W‖_F`` per slice as they were when factorised, so that a
    rewrite that wired the wrong basis can be told from one that is merely lossy.
    ``inputs`` are the two example calls as specs (names to :class:`InputSpec` or constants).
    """

    config: ShareConfig
    plan: Plan
    report: Report
    front_end: str
    source: Source
    relaxed: tuple[int, ...] = ()
    slice_errors: Mapping[str, float] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def specs(shapes: Shapes | None) -> tuple[Mapping[str, Any], ...]:
        """The example calls as specs."""
        if shapes is None:
            return ()
        calls = [shapes.base] if shapes.other is None else [shapes.base, shapes.other]
        return tuple(
            {k: InputSpec.of(v) if isinstance(v, Tensor) else v for k, v in call.items()}
            for call in calls
        )

    def random_call(self, number: int, *, seed: int, device: torch.device) -> Call:
        """A random call of the form of example ``number``."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: spec.random(generator, device) if isinstance(spec, InputSpec) else spec
            for name, spec in self.inputs[number].items()
        }


class ShareModule(fx.GraphModule):
    """A rewritten model: a ``torch.fx.GraphModule`` that carries its :class:`Record`."""

    @property
    def fxshare(self) -> Record:
        """The plan, the report and the configuration it was compiled with."""
        found: Record = self.meta["fxshare"]
        return found


def record_of(module: nn.Module) -> Record:
    """The record of a compiled model; :class:`FxShareError` if it is not one."""
    meta = getattr(module, "meta", None)
    if not isinstance(meta, dict) or "fxshare" not in meta:
        raise FxShareError(
            f"{type(module).__name__} was not made by fxshare.compile or fxshare.load"
        )
    found: Record = meta["fxshare"]
    return found


def slices_of(module: nn.Module) -> Mapping[str, Slice]:
    """Where each slice of a compiled model is."""
    return module_slices(module)


def slice_product(module: nn.Module, name: str) -> Tensor:
    """The weight ``(out, in)`` that a slice of a compiled model stands for, in float64."""
    place = slices_of(module)[name]
    weight_OI, _ = weight_and_bias(module.get_submodule(place.module))
    rows = weight_OI.detach()[place.start : place.stop].double()
    if place.basis is None:
        return rows
    basis_RI, _ = weight_and_bias(module.get_submodule(place.basis))
    return rows @ basis_RI.detach().double()


def dense_sites(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every site multiplied out, in float64."""
    return {
        site.name: torch.cat([slice_product(module, s.name) for s in site.slices])
        for site in plan.sites
    }
