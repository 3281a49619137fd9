"""Calls of a model, eager and under ``torch.compile``, and what compiling them took."""

from __future__ import annotations

import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.errors import FxShareError

Call = Mapping[str, Any]
# what torch's own timers call the part that inductor takes
_INDUCTOR = "compile_fx_inner"


@dataclass(frozen=True, eq=False)
class CompiledCall:
    """``run`` calls the compiled model; ``seconds`` are those of the first call, in which it was
    compiled, and ``inductor_seconds`` the compiler backend's part of them."""

    run: Callable[[], object]
    seconds: float
    inductor_seconds: float


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
    """Compile for the shapes of this call, with nothing taken from a cache.

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

    before = _inductor_seconds()
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
    return CompiledCall(run, seconds, _inductor_seconds() - before)


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

    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore", UserWarning)
        yield


def _inductor_seconds() -> float:
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(compilation_time_metrics.get(_INDUCTOR, ())))
