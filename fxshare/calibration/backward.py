"""One backward pass per batch: the gradient of the loss at the output of every site."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fxshare.calibration.distance import DISTANCE
from fxshare.calibration.draws import Draws
from fxshare.calibration.hooked import HookStage
from fxshare.calibration.losses import Labels, Loss, default_loss
from fxshare.calibration.observed import GraphStage
from fxshare.calibration.offload import offloaded
from fxshare.capture.call import Call
from fxshare.errors import CalibrationError


class Backward:
    """Runs a batch forward and backward; only the taps ask for gradients."""

    def __init__(
        self,
        running: GraphStage | HookStage,
        loss: Loss | None,
        labels: Labels,
        seed: int,
        *,
        offload: bool = False,
    ) -> None:
        self.running = running
        self.loss = loss
        self.labels: Labels = labels
        self.draws = Draws(torch.Generator().manual_seed(seed))
        self.offload = offload
        self.name = ""
        self.losses: dict[int, float] = {}
        """By the number of the batch."""

    def __call__(self, call: Call, batch: object, number: int) -> None:
        """Run the batch of that number."""
        with torch.enable_grad(), self._saving():
            output = self.running(call)
            if self.loss is None:
                generator = self.draws.turn(output, call, self.labels)
                value, self.name = default_loss(
                    output,
                    call,
                    labels=self.labels,
                    generator=generator,
                    last_reader=True,
                )
            else:
                value, self.name = self.loss(output, batch), "the loss given"
            _check_loss(value)
            probes = [tap.probe for tap in self.running.taps.values()]
            torch.autograd.grad(value, probes, allow_unused=True)
        if self.name != DISTANCE:  # the distance of the dense model from itself is zero
            self.losses[number] = float(value.detach())
        for name, tap in self.running.taps.items():
            if not tap.finite:
                raise CalibrationError(
                    f"the gradient at {tap.slices[0].name!r} ({name}) has NaN or infinite values; "
                    "leave such batches out, or calibrate in float32"
                )

    def complete(self, batches: int) -> None:
        """Say that this was the last of so many batches, which not every process may have had."""
        if self.loss is None:
            self.draws.complete(batches)

    def _saving(self) -> AbstractContextManager[None]:
        return offloaded(self.running.module) if self.offload else nullcontext()


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise CalibrationError(
            "loss: expected a scalar tensor that depends on the model's output, found "
            f"{type(value).__name__} {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
        )
    if not bool(torch.isfinite(value)):
        raise CalibrationError(f"the calibration loss is {float(value.detach())}; check the data")
