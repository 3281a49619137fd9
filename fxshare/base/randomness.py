"""Random numbers for our own runs of a model, which other threads must not notice.

torch's generator is every thread's: saving its state and setting it back lets another thread draw
the same numbers twice. What a run draws comes from a generator of its own instead.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import thread as pools
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# threads that draw nothing and are left running: tqdm's monitor, and the two of Inductor that look
# after its compiling processes
_NO_USERS = frozenset({"TMonitor", "InductorSubproc", "subproc_worker_timer"})


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Let torch draw for this thread alone, on from where its generator is, or from ``seed``.

    Those of Python and numpy are as before afterwards where no other thread may have drawn from
    them meanwhile (``randomness_as_before``).
    """
    with randomness_as_before(seed), _OwnGenerators(seed):
        yield


@contextmanager
def randomness_as_before(seed: int | None = None) -> Iterator[None]:
    """All generators as before afterwards, those of Python and numpy from ``seed`` on meanwhile;
    where other threads run they are left alone, since what was drawn may have been theirs.

    Others that wait for work, at the beginning and at the end, do not count: of what ran meanwhile
    this thread has started everything.
    """
    alone = _alone()
    python, of_numpy = random.getstate(), np.random.get_state()
    seeded, state = torch.initial_seed(), torch.get_rng_state()
    try:
        if seed is not None and alone:
            random.seed(seed)
            np.random.seed(seed)
        yield
    finally:
        if alone and _alone():
            random.setstate(python)
            np.random.set_state(of_numpy)
            torch.set_rng_state(state)
        elif torch.initial_seed() != seeded:  # the model has seeded it
            torch.set_rng_state(state)


def _alone() -> bool:
    """Whether no thread but this one can be about to draw, unless it is given work."""
    here, frames = threading.current_thread(), sys._current_frames()
    return all(
        t is here or {t.name, type(t).__name__} & _NO_USERS or _waits(frames.get(t.ident or 0))
        for t in threading.enumerate()
    )


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread in ``frame`` is a worker of a ``ThreadPoolExecutor`` without work: Inductor,
    event loops and others keep theirs when the work is done."""
    if frame is None or frame.f_code is not pools._worker.__code__:
        return False
    # work that was handed over and not yet taken is in the queue
    return frame.f_locals.get("work_item") is None and frame.f_locals["work_queue"].empty()


class _OwnGenerators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands random operations a generator of this run, one for each device."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        device = _device(args, given)
        if device.type not in ("cpu", "cuda"):
            return func(*args, **given)
        if given.get("generator") is not None:
            return func(*args, **given)
        return drawn(func, args, given, self._generator(device))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            made = torch.Generator(device)
            if self._seed is None:
                made.set_state(_of_all(device).get_state())
            else:
                made.manual_seed(self._seed)
            self._generators[device] = made
        return self._generators[device]


def _device(args: Any, kwargs: Any) -> torch.device:
    found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = found[0].device if found else torch.device(kwargs.get("device") or "cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _of_all(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def drawn(func: Any, args: Any, kwargs: Any, generator: torch.Generator) -> Any:
    """What a random operation gives with the numbers of ``generator``."""
    taking = _taking_generator(func)
    if taking is not None:
        return taking(*args, **{**kwargs, "generator": generator})
    # it takes none: for this one operation the state of torch's own is exchanged
    of_all = _of_all(generator.device)
    before = of_all.get_state()
    of_all.set_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        generator.set_state(of_all.get_state())
        of_all.set_state(before)


def _taking_generator(func: Any) -> Any:
    """The operation, or the overload of it, that takes a generator; None where none does."""
    wanted = {a.name: str(a.type) for a in func._schema.arguments}
    if "generator" in wanted:
        return func
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        taken = {a.name: str(a.type) for a in other._schema.arguments}
        by_name = any(a.name == "generator" and a.kwarg_only for a in other._schema.arguments)
        if taken.pop("generator", None) and by_name and taken == wanted:
            return other
    return None


__all__ = ["drawn", "own_randomness", "randomness_as_before"]
