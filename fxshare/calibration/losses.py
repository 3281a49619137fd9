"""The loss whose second-order increase the planner minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fxshare.calibration.cross_entropy import next_token_losses
from fxshare.calibration.distance import DISTANCE, projected
from fxshare.capture.call import MASK, Call
from fxshare.errors import CalibrationError

Loss = Callable[[Any, Any], Tensor]
"""``(output, batch) → scalar``, summed over the tokens (a mean would shrink with the batch)."""
Labels = Literal["data", "sampled"]


def next_token_logits(output: Any, call: Call) -> tuple[Tensor, Tensor] | None:
    """Logits ``(B, T, V)`` and token ids ``(B, T)`` where the call is that of a language model."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        return None
    for name, value in call.items():
        if (
            name != MASK
            and isinstance(value, Tensor)
            and value.dtype in (torch.int64, torch.int32)
            and value.shape == logits.shape[:2]
            and value.shape[1] > 1
            and int(value.max()) < logits.shape[-1]
        ):
            return logits, value
    return None


def first_ids(call: Call) -> set[int]:
    """The token ids that the samples of a call start with; those that padding comes before are left
    out. Empty where a call has no ids ``(B, T)``."""
    mask = call.get(MASK)
    for name, value in call.items():
        if (
            name != MASK
            and isinstance(value, Tensor)
            and value.ndim == 2
            and value.dtype in (torch.int64, torch.int32)
            and value.numel()
        ):
            firsts = value[:, 0]
            if isinstance(mask, Tensor) and mask.shape == value.shape:
                firsts = firsts[mask[:, 0].bool()]
            return set(firsts.tolist())
    return set()


def default_loss(
    output: Any,
    call: Call,
    *,
    labels: Labels = "data",
    generator: torch.Generator | None = None,
    last_reader: bool = False,
) -> tuple[Tensor, str]:
    """Summed next-token cross-entropy for a language model; else what has the second moments of
    gradients of the :mod:`distance <fxshare.calibration.distance>` to the dense output.

    With ``labels="sampled"`` the next tokens are drawn from the model itself: the expectation of
    the squared gradient is then the Fisher matrix proper. Positions that are masked, or whose
    target is, do not count. Returns the loss and its name. Of the ``last_reader`` of the logits the
    backward pass may overwrite them.

    Raises :class:`CalibrationError` when there is nothing to differentiate.
    """
    found = next_token_logits(output, call)
    if found is None:
        projection = projected(output, call, generator)
        if projection is None:
            raise CalibrationError(
                "the model's output has no floating-point tensor to take a loss of; give loss=..."
            )
        return projection, DISTANCE
    logits, ids = found
    targets = ids[:, 1:].long()
    if labels == "sampled":
        with torch.no_grad():
            # on the CPU, where the generator is: the same seed draws the same labels everywhere
            probabilities = torch.softmax(_wide(logits[:, :-1].flatten(0, 1)), -1).cpu()
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            targets = drawn.view(targets.shape).to(targets.device)
    losses = next_token_losses(logits, targets, last_reader=last_reader).flatten()
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        # of left padding the last position predicts a token, from nothing
        both = mask[:, 1:].bool() & mask[:, :-1].bool()
        losses = losses * both.flatten().to(losses.dtype)
    name = "next-token cross-entropy"
    return losses.sum(), name if labels == "data" else f"{name}, sampled labels"


def _wide(values: Tensor) -> Tensor:
    """Half precision in float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
