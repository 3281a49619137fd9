"""What a caller may have put around a call, and what it is to be computed in instead.

Modes of torch act on whatever runs inside of them: autocast rounds the statistics, inference mode
makes tensors that can never be trained, fake tensors have no values. Weights are measured and
rewritten outside of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fxshare.errors import CaptureError
from passes.graph.graph import structure_copy

T = TypeVar("T")
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_WITHOUT_VALUES = ("FAKE", "PROXY", "FUNCTIONAL")


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Leave the caller's inference mode, autocast, fake tensors and default device ``meta``.

    Gradients stay as they are. Raises :class:`CaptureError` inside of a transform of
    ``torch.func``, which cannot be left: its tensors stand for many, or for none.
    """
    _refuse_transforms()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        keys: Any = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(getattr(keys, key)) for key in _WITHOUT_VALUES):
            stack.enter_context(_disable_current_modes())
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield


def _refuse_transforms() -> None:
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:
        name = str(transform.key()).rpartition(".")[2].lower()
        raise CaptureError(
            f"called inside of a transform of torch.func ({name}), where a tensor stands for "
            "others and has no values to look at; call it before, and transform what it returns"
        )


def outside_inference(model: T) -> T:
    """The model, or what is none; one that was made in inference mode as a copy with gradients."""
    if not isinstance(model, nn.Module):
        return model
    if not any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        return model
    return structure_copy(model, clone_parameters=True)


__all__ = ["outside_inference", "plain_surroundings"]
