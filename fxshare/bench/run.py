"""``fxshare bench run``: dense, readable and lowered models beside each other, step by step.

All variants of a step run in turn, so that whatever else the machine does slows all alike; times
are medians, spreads interquartile ranges, and ratios medians of the ratios within each round.
"""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fxshare.bench.compiling import (
    CompiledCall,
    compiled_call,
    eager_call,
    warm_compiler,
)
from fxshare.bench.device import synchronise
from fxshare.bench.machine import environment, interleaved
from fxshare.bench.notebook_layout import notebook_layout
from fxshare.bench.steps import StepCall, step_calls
from fxshare.bench.subject import Subject
from fxshare.capture import device_of, dtype_of
from fxshare.cost_model import Rates, Step, seconds, step_bytes, step_flops
from fxshare.cost_model.device import how_to_measure_for, rates_for, threads_of
from fxshare.cost_model.recorder import record_step
from fxshare.errors import ConfigError

Lower = Callable[[Any], nn.Module]
VARIANTS = ("dense", "exact", "exact-lowered", "notebook", "readable", "lowered")
MODES = ("eager", "compiled")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
_LEAST = 0.005


@dataclass(frozen=True)
class Measurement:
    """One variant at one step. ``seconds`` are per pass of ``tokens`` tokens, ``spread`` the
    interquartile range, ``speedup`` dense over this in the same mode; ``predicted`` is what the
    cost model says of both, None where the device was not measured or the pass not recorded.

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
    inductor_seconds: float | None
    flops: int | None
    weight_bytes: int | None


@dataclass(frozen=True)
class SpeedBench:
    """A run of the benchmark on one machine."""

    environment: dict[str, object]
    model: str
    dtype: str
    device: str
    threads: int
    params_kept: float
    kv_cache: bool
    repeats: int
    rows: tuple[Measurement, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


def chosen(names: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    """Names from a comma-separated option, in the order of ``known``; :class:`ConfigError` for one
    that is none of them."""
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{option}: expected some of {', '.join(known)}; found {name!r}.{hint}"
            )
    return tuple(name for name in known if name in given)


def bench_run(
    subject: Subject,
    *,
    variants: Sequence[str] = VARIANTS,
    modes: Sequence[str] = MODES,
    repeats: int = 7,
    prefill: int = 512,
    compile_mode: str = "default",
    lower: Lower | None = None,
    say: Callable[[str], None] = lambda line: None,
    seed: int = 0,
) -> SpeedBench:
    """Measure the variants of a subject at prefill (``prefill`` tokens, fewer where the model takes
    fewer) and decode (one token).

    ``dense`` is always among them. ``lower`` makes the fast graph from the readable one;
    :func:`fxshare.lowering.lower` for speed where None.

    Raises :class:`ConfigError` for a variant that the subject does not have.
    """
    start = time.perf_counter()
    device, dtype = device_of(subject.dense), dtype_of(subject.dense)
    rates = rates_for(device, dtype)
    names = tuple(name for name in VARIANTS if name == "dense" or name in variants)
    say(f"{subject.name}: making {', '.join(names)}")
    models = _variants(subject, names, lower or _lowered)
    rows: list[Measurement] = []
    notes: list[str] = []
    if rates is None:
        command = how_to_measure_for(subject.dense)
        notes.append(f"times are not predicted: this device was not measured, run {command}")
    if "compiled" in modes:
        warm_compiler(device, dtype)
    with torch.no_grad():
        for step in step_calls(subject, models, prefill=prefill, seed=seed):
            steps = _recorded(models, step, notes)
            for mode in modes:
                say(f"{step.name}, {mode}")
                rows += _measured(
                    step, models, steps, mode, rates, repeats=repeats, compile_mode=compile_mode
                )
    return SpeedBench(
        environment=environment(),
        model=subject.name,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        threads=threads_of(device),
        params_kept=subject.plan.params_kept,
        kv_cache=subject.kv_cache,
        repeats=repeats,
        rows=tuple(rows),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _lowered(gm: Any) -> nn.Module:
    from fxshare.lowering import lower

    made: nn.Module = lower(gm, prefer="speed")
    return made


def _variants(subject: Subject, names: Sequence[str], lower: Lower) -> dict[str, nn.Module]:
    exact: nn.Module | None = None
    found: dict[str, nn.Module] = {}
    for name in names:
        if name == "dense":
            found[name] = subject.dense
        elif name == "notebook":
            found[name] = notebook_layout(subject.dense, subject.compiled, subject.plan)
        elif name.startswith("exact"):
            exact = exact or _exact(subject, name)
            found[name] = lower(exact) if name == "exact-lowered" else exact
        else:
            found[name] = lower(subject.compiled) if name == "lowered" else subject.compiled
    return found


def _exact(subject: Subject, name: str) -> nn.Module:
    if subject.make_exact is None:
        raise ConfigError(
            f"--variants {name}: {subject.name} does not hold the original weights; leave it out"
        )
    return subject.make_exact()


def available(subject: Subject) -> tuple[str, ...]:
    """The variants that a subject has."""
    return tuple(v for v in VARIANTS if subject.make_exact is not None or not v.startswith("exact"))


def _recorded(
    models: Mapping[str, nn.Module], step: StepCall, notes: list[str]
) -> dict[str, Step | None]:
    found: dict[str, Step | None] = {}
    for name, model in models.items():
        try:
            found[name] = record_step(model, step.recorded)
        except Exception as error:  # fake tensors have no values, and a model's code may read some
            found[name] = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            notes.append(f"{step.name} of {name} could not be counted: {reason}")
    return found


def _measured(
    step: StepCall,
    models: Mapping[str, nn.Module],
    steps: Mapping[str, Step | None],
    mode: str,
    rates: Rates | None,
    *,
    repeats: int,
    compile_mode: str,
) -> list[Measurement]:
    compiled: dict[str, CompiledCall] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        if mode == "compiled":
            one = compiled_call(name, model, step.calls[name], step.after[name], mode=compile_mode)
            compiled[name], calls[name] = one, one.run
        else:
            calls[name] = eager_call(model, step.calls[name], step.after[name])
    numbers = {name: _number(call, step.device) for name, call in calls.items()}
    loops = {name: _loop(call, numbers[name], step.device) for name, call in calls.items()}
    runs = interleaved(loops, repeats=repeats)
    times = {name: [t / numbers[name] for t in taken] for name, taken in runs.items()}
    predicted = {
        name: None if one is None or rates is None else _predicted(rates, one, mode)
        for name, one in steps.items()
    }
    return [
        _row(step, name, mode, times, predicted, steps[name], compiled.get(name), dtype_of(model))
        for name, model in models.items()
    ]


def _predicted(rates: Rates, step: Step, mode: str) -> float:
    return seconds(rates, step, compiled=mode == "compiled")


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
    compiled: CompiledCall | None,
    dtype: torch.dtype,
) -> Measurement:
    own, dense = predicted[name], predicted["dense"]
    median = statistics.median(times[name])
    return Measurement(
        step=step.name,
        tokens=step.tokens,
        variant=name,
        mode=mode,
        seconds=median,
        spread=_spread(times[name]),
        speedup=statistics.median(d / t for d, t in zip(times["dense"], times[name], strict=True)),
        predicted_seconds=own,
        predicted_speedup=None if own is None or dense is None else dense / own,
        compile_seconds=None if compiled is None else max(compiled.seconds - median, 0.0),
        inductor_seconds=None if compiled is None else compiled.inductor_seconds,
        flops=None if recorded is None else step_flops(recorded),
        weight_bytes=None if recorded is None else step_bytes(recorded, dtype.itemsize),
    )


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low
