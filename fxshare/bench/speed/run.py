"""``fxshare bench run``: dense, readable and lowered models beside each other, step by step."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.bench.speed.alone import alone, alone_steps
from fxshare.bench.speed.compiled import warm_compiler
from fxshare.bench.speed.measuring import Measurement, Timing, measured, recorded
from fxshare.bench.speed.notebook import notebook_layout
from fxshare.bench.speed.steps import StepCall, step_calls
from fxshare.bench.speed.subject import Subject
from fxshare.capture import device_of, dtype_of
from fxshare.cost_model.device import how_to_measure_for, rates_for, threads_of
from fxshare.errors import ConfigError

_LOG = logging.getLogger(__name__)

Lower = Callable[[Any], nn.Module]
VARIANTS = ("dense", "exact", "exact-lowered", "notebook", "readable", "lowered")


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
    compile_repeats: int
    rows: tuple[Measurement, ...]
    alone: dict[str, tuple[Measurement, ...]]
    """By weight type: its linears by themselves, all layers' in turn; empty unless asked for."""
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


@stage("bench run", _LOG)
def bench_run(
    subject: Subject,
    timing: Timing,
    *,
    variants: Sequence[str] = VARIANTS,
    by_type: bool = False,
    lower: Lower | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SpeedBench:
    """Measure the variants of a subject at prefill and decode.

    ``dense`` is always among them. With ``by_type`` the linears of each weight type are measured by
    themselves as well. ``lower`` makes the fast graph from the readable one;
    :func:`fxshare.rewriting.lowering.lower` for speed where None.

    Raises :class:`ConfigError` for a variant that the subject does not have.
    """
    start = time.perf_counter()
    device, dtype = device_of(subject.dense), dtype_of(subject.dense)
    rates = rates_for(device, dtype)
    names = tuple(name for name in VARIANTS if name == "dense" or name in variants)
    say(f"{subject.name}: making {', '.join(names)}")
    models = _variants(subject, names, lower or _lowered)
    notes: list[str] = []
    if rates is None:
        command = how_to_measure_for(subject.dense)
        notes.append(f"times are not predicted: this device was not measured, run {command}")
    if "compiled" in timing.modes:
        warm_compiler(device, dtype)

    def rows_of(
        models: Mapping[str, nn.Module], steps: Sequence[StepCall], what: str = ""
    ) -> tuple[Measurement, ...]:
        rows: list[Measurement] = []
        for step in steps:
            counted = recorded(models, step, notes)
            for mode in timing.modes:
                say(f"{what}{step.name}, {mode}")
                rows += measured(step, models, counted, mode, rates, timing)
        return tuple(rows)

    with torch.no_grad():
        steps = step_calls(
            subject, models, prefill=timing.prefill, seed=timing.seed, batch=timing.batch
        )
        rows = rows_of(models, steps)
        found: dict[str, tuple[Measurement, ...]] = {}
        for part in alone(subject) if by_type else ():
            parts = _variants(part, names, lower or _lowered)
            steps = alone_steps(part, parts, prefill=rows[0].tokens, seed=timing.seed)
            found[part.name] = rows_of(parts, steps, f"{part.name}, ")
    return SpeedBench(
        environment=environment(),
        model=subject.name,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        threads=threads_of(device),
        params_kept=subject.plan.params_kept,
        kv_cache=subject.kv_cache,
        repeats=timing.repeats,
        compile_repeats=timing.compile_repeats,
        rows=rows,
        alone=found,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _lowered(gm: Any) -> nn.Module:
    from fxshare.rewriting.lowering import lower

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
    left = set() if subject.make_exact is not None else {"exact", "exact-lowered"}
    left |= {"notebook"} if subject.plan.units or subject.plan.rounded else set()
    return tuple(variant for variant in VARIANTS if variant not in left)
