"""Weights that a model's own ``forward`` writes to: a rewritten linear has none to be written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxshare.errors import CaptureError


class Unwritten:
    """The weights of some modules as they were before the model was run; those that were exchanged
    (``weight.data = ...``) are put back."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._before = [
            (f"{name}.{field}", parameter, parameter.detach(), _digest(parameter))
            for name in names
            if name in modules
            for field, parameter in modules[name].named_parameters(recurse=False)
        ]

    def restore(self) -> list[str]:
        """Put back what was exchanged; the parameters that were written to."""
        found = []
        for name, parameter, data, digest in self._before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
                found.append(name)
            elif _digest(parameter) != digest:
                found.append(name)
        return found


def refuse_written(model: nn.Module, names: Sequence[str]) -> None:
    """Raise :class:`CaptureError` where ``forward`` wrote to parameters."""
    if names:
        raise CaptureError(
            f"{type(model).__name__}.forward writes to {names[0]!r} ({len(names)} parameters in "
            "all), and a rewritten linear has no such parameter; write to it outside of forward "
            "(after the optimizer's step, say), or let the pattern leave it out"
        )


def _digest(tensor: Tensor) -> tuple[int, str] | None:
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    with torch.no_grad():
        # all bits, and the signs, which may cancel in them; as text, for NaN is not equal to itself
        return int(torch.hash_tensor(tensor).item()), str(float(tensor.sum(dtype=torch.float64)))


__all__ = ["Unwritten", "refuse_written"]
