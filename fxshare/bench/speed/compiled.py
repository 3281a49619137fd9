"""Calls of a model, eager and under ``torch.compile``, and what compiling them took."""

from __future__ import annotations

import os
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.bench.speed.steps import StepCall
from passes.errors import FxShareError

Call = Mapping[str, Any]
# what torch's own timers call the part that inductor takes
_INDUCTOR = "compile_fx_inner"


@dataclass(frozen=True, eq=False)
class CompiledCall:
    """``run`` calls the compiled model; ``seconds`` are those of the first call, in which it was
    compiled, ``inductor_seconds`` the compiler backend's part of them, and ``cpu_seconds`` those
    that this process and the compilers that it started were busy."""

    run: Callable[[], object]
    seconds: float
    inductor_seconds: float
    cpu_seconds: float


def compiled_calls(
    models: Mapping[str, nn.Module], step: StepCall, *, mode: str, repeats: int
) -> dict[str, list[CompiledCall]]:
    """Compile every model ``repeats`` times, in turn, and each time from nothing."""
    found: dict[str, list[CompiledCall]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            call, after = step.calls[name], step.after[name]
            found[name].append(compiled_call(name, model, call, after, mode=mode))
    return found


def eager_call(model: nn.Module, call: Call, after: Callable[[], None]) -> Callable[[], object]:
    """A call of the model; ``after`` runs after each."""

    def run() -> object:
        out = model(**call)
        after()
        return out

    return run


def compiled_call(
    name: str, model: nn.Module, call: Call, after: Callable[[], None], *, mode: str
) -> CompiledCall:
    """Compile for the shapes of this call, with nothing taken from a cache and no other process
    helping: how many cores are free would show in the time.

    Raises :class:`FxShareError` naming the variant where ``torch.compile`` fails.
    """

    def forward(call: Call) -> object:
        return model(**call)

    # dynamo keeps what it compiles with the code object: a code of its own for each, so that none
    # checks the guards of the others
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, name, None, forward.__closure__
    )
    compiled = torch.compile(own, mode=mode, dynamic=False)

    def run() -> object:
        out = compiled(call)
        after()
        return out

    before, cpu = _inductor_seconds(), _cpu_seconds()
    start = time.perf_counter()
    try:
        with _without_caches():
            run()
    except Exception as error:  # the compiler's own kinds; a missing C++ compiler is one of them
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FxShareError(
            f"{name}: torch.compile fails: {type(error).__name__}: {reason}; leave the variant or "
            "the compiled mode out (--modes eager)"
        ) from error
    seconds = time.perf_counter() - start
    return CompiledCall(run, seconds, _inductor_seconds() - before, _cpu_seconds() - cpu)


def warm_compiler(device: torch.device, dtype: torch.dtype) -> None:
    """Compile something small: the first compilation of a process also starts the compiler."""
    x = torch.ones(2, 2, device=device, dtype=dtype)
    with _without_caches():
        torch.compile(_small, dynamic=False)(x)


def _small(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) @ x


@contextmanager
def _without_caches() -> Iterator[None]:
    from torch._inductor import config

    with warnings.catch_warnings(), config.patch(force_disable_caches=True, compile_threads=1):
        warnings.simplefilter("ignore", UserWarning)
        yield


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and of those that it waited for


def _inductor_seconds() -> float:
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(compilation_time_metrics.get(_INDUCTOR, ())))
