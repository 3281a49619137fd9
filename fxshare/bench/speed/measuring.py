"""Variants of one step beside each other: run in turn, so that what else the machine does slows all
alike. Times are medians, spreads interquartile ranges, and ratios medians of the ratios within each
round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxshare.base.machine import interleaved
from fxshare.bench.speed.compiled import CompiledCall, compiled_calls, eager_call
from fxshare.bench.speed.device import clock_of, synchronise
from fxshare.bench.speed.steps import StepCall
from fxshare.capture import dtype_of
from fxshare.cost_model import Rates, Step, pass_seconds, step_bytes, step_flops
from fxshare.cost_model.recorder import record_step

MODES = ("eager", "compiled")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
_LEAST = 0.005


@dataclass(frozen=True)
class Timing:
    """How variants are timed: each ``repeats`` times in every one of ``modes``, on a prompt of
    ``prefill`` tokens (fewer where the model takes fewer) and on one token. Each is compiled
    ``compile_repeats`` times from nothing, and the last is run."""

    modes: tuple[str, ...] = MODES
    repeats: int = 7
    prefill: int = 512
    compile_mode: str = "default"
    compile_repeats: int = 1
    seed: int = 0
    """Of the random tokens."""
    batch: int = 1
    """Sequences at a time."""


@dataclass(frozen=True)
class Measurement:
    """One variant at one step. ``seconds`` are per pass of ``tokens`` tokens, ``spread`` the
    interquartile range, ``speedup`` dense over this in the same mode; ``predicted`` is what the
    cost model says of both, None where the device was not measured or the pass not recorded.

    ``compile_seconds`` are those of the first call beyond a normal one, ``inductor_seconds`` the
    compiler backend's part of them, ``compile_cpu_seconds`` what the processor was busy for; the
    two ratios are this over dense.

    ``flops`` are those of all products of a pass, ``weight_bytes`` what they read of weights.
    """

    step: str
    tokens: int
    variant: str
    mode: str
    seconds: float
    spread: float
    speedup: float
    predicted_seconds: float | None
    predicted_speedup: float | None
    compile_seconds: float | None
    compile_cpu_seconds: float | None
    compile_cpu_ratio: float | None
    inductor_seconds: float | None
    inductor_ratio: float | None
    flops: int | None
    weight_bytes: int | None


def measured(
    step: StepCall,
    models: Mapping[str, nn.Module],
    steps: Mapping[str, Step | None],
    mode: str,
    rates: Rates | None,
    timing: Timing,
) -> list[Measurement]:
    """Every model at one step; ``dense`` must be among them. ``steps`` is what :func:`recorded`
    found."""
    compiled: dict[str, list[CompiledCall]] = {}
    calls: dict[str, Callable[[], object]] = {}
    if mode == "compiled":
        compiled = compiled_calls(
            models, step, mode=timing.compile_mode, repeats=timing.compile_repeats
        )
        calls = {name: found[-1].run for name, found in compiled.items()}
    else:
        calls = {n: eager_call(m, step.calls[n], step.after[n]) for n, m in models.items()}
    numbers = {name: _number(call, step.device) for name, call in calls.items()}
    loops = {name: _loop(call, numbers[name], step.device) for name, call in calls.items()}
    runs = interleaved(loops, repeats=timing.repeats, clock=clock_of(step.device))
    times = {name: [t / numbers[name] for t in taken] for name, taken in runs.items()}
    predicted = {
        name: None
        if one is None or rates is None
        else pass_seconds(rates, one, compiled=mode == "compiled")
        for name, one in steps.items()
    }
    return [
        _row(step, name, mode, times, predicted, steps[name], compiled, dtype_of(model))
        for name, model in models.items()
    ]


def recorded(
    models: Mapping[str, nn.Module], step: StepCall, notes: list[str]
) -> dict[str, Step | None]:
    """The operations of every model at one step; what cannot be counted is said in ``notes``."""
    found: dict[str, Step | None] = {}
    for name, model in models.items():
        try:
            found[name] = record_step(model, step.recorded)
        except Exception as error:  # fake tensors have no values, and a model's code may read some
            found[name] = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            notes.append(f"{step.name} of {name} could not be counted: {reason}")
    return found


def _number(call: Callable[[], object], device: torch.device) -> int:
    """How often to call so that the clock does not matter."""
    call()
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return max(1, round(_LEAST / max(time.perf_counter() - start, 1e-6)))


def _loop(call: Callable[[], object], number: int, device: torch.device) -> Callable[[], object]:
    def run() -> None:
        for _ in range(number):
            call()
        synchronise(device)

    return run


def _row(
    step: StepCall,
    name: str,
    mode: str,
    times: Mapping[str, list[float]],
    predicted: Mapping[str, float | None],
    recorded: Step | None,
    compiled: Mapping[str, Sequence[CompiledCall]],
    dtype: torch.dtype,
) -> Measurement:
    own, dense = predicted[name], predicted["dense"]
    median = statistics.median(times[name])
    first = {which: [c.seconds for c in calls] for which, calls in compiled.items()}
    inductor = {which: [c.inductor_seconds for c in calls] for which, calls in compiled.items()}
    cpu = {which: [c.cpu_seconds for c in calls] for which, calls in compiled.items()}
    return Measurement(
        step=step.name,
        tokens=step.tokens,
        variant=name,
        mode=mode,
        seconds=median,
        spread=_spread(times[name]),
        speedup=_ratio(times["dense"], times[name]),
        predicted_seconds=own,
        predicted_speedup=None if own is None or dense is None else dense / own,
        compile_seconds=max(statistics.median(first[name]) - median, 0.0) if first else None,
        compile_cpu_seconds=statistics.median(cpu[name]) if cpu else None,
        compile_cpu_ratio=_ratio(cpu[name], cpu["dense"]) if cpu else None,
        inductor_seconds=statistics.median(inductor[name]) if inductor else None,
        inductor_ratio=_ratio(inductor[name], inductor["dense"]) if inductor else None,
        flops=None if recorded is None else step_flops(recorded),
        weight_bytes=None if recorded is None else step_bytes(recorded, dtype.itemsize),
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low
