"""What a batch's activations take while its loss is differentiated, without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshare.base.fakes import failures_unsaid
from fxshare.capture import Call, Captured, tensors

_NUMBERS = 4
"""Numbers that are kept per output of a weight and token: of what follows it, too."""


def at_most(captured: Captured, call: Call) -> int:
    """A quick bound in bytes: what every matrix of the model writes for every token, several times.

    Attention over long sequences may exceed it, which :func:`activation_bytes` sees.
    """
    return most_bytes(captured.module, call)


def most_bytes(module: nn.Module, call: Call) -> int:
    """:func:`at_most` of a module."""
    rows = max((t.shape[0] * t.shape[1] for t in tensors(call) if t.ndim >= 2), default=1)
    outputs = sum(sum(p.shape) for p in module.parameters() if p.ndim >= 2)
    return 4 * _NUMBERS * rows * outputs


class Activations(NamedTuple):
    """Bytes that are alive at once while a call runs, weights apart, and what stays in memory of
    them where they are written to a file as they come: three times the largest, the logits, for
    the loss and the backward pass."""

    alive: int
    in_memory: int


def activation_bytes(captured: Captured, call: Call, *, gradients: bool) -> Activations:
    """What a call takes: with ``gradients`` what the backward pass needs, and three times the
    largest of it for the loss and that pass.

    Runs on fake tensors; where the model cannot, the answer is :func:`at_most`.
    """
    found = alive_bytes(captured.run, call, gradients=gradients)
    return Activations(at_most(captured, call), 0) if found is None else found


def alive_bytes(
    run: Callable[[Call], object], call: Call, *, gradients: bool
) -> Activations | None:
    """:func:`activation_bytes` of whatever takes calls; None where it does not run on fake
    tensors."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    fake_call = pytree.tree_map_only(Tensor, fakes.from_tensor, dict(call))
    alive = _Alive()
    try:
        with torch.set_grad_enabled(gradients), failures_unsaid(), fakes, alive:
            output = run(fake_call)
            del output
    except Exception:
        return None
    at_the_end = 3 * alive.largest if gradients else 0
    return Activations(alive.most + at_the_end, at_the_end)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of results that something still refers to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self.largest = 0
        self._now = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in pytree.tree_leaves(out):
            if isinstance(result, Tensor):
                self._count(result)
        return out

    def _count(self, result: Tensor) -> None:
        storage = result.untyped_storage()
        key = storage._cdata
        if key not in self._holders:
            self._holders[key] = 0
            size = storage.nbytes()
            self._now += size
            self.most = max(self.most, self._now)
            self.largest = max(self.largest, size)
        self._holders[key] += 1
        weakref.finalize(result, self._dropped, key, storage.nbytes()).atexit = False

    def _dropped(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._now -= size


__all__ = ["Activations", "activation_bytes", "alive_bytes", "at_most", "most_bytes"]
