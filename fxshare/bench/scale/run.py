"""The benchmark: every shape at every number of layers, planned and beside what it is held to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from fxshare.base.machine import environment
from fxshare.base.memory import free, shown
from fxshare.base.progress import stage
from fxshare.bench.scale.child import in_own_process
from fxshare.bench.scale.measure import METHODS, Job, Method, ScaleRun, Settings
from fxshare.bench.speed.device import dtype_of_name
from fxshare.errors import ConfigError
from fxshare.models.shapes import ModelShape

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """How the processor seconds of a method grow from one number of layers to the next."""

    shape: str
    method: Method
    layers: tuple[int, int]
    times: float
    """Seconds at the second over those at the first; linear growth is that of the layers."""


@dataclass(frozen=True)
class Beside:
    """How many times the processor seconds of another method planning takes."""

    shape: str
    layers: int
    method: Method
    times: float


@dataclass(frozen=True)
class ScaleBench:
    """Runs on one machine, each in a process of its own; processor seconds, which other work on the
    machine hardly lengthens."""

    environment: dict[str, object]
    settings: Settings
    runs: tuple[ScaleRun, ...]

    @property
    def growth(self) -> tuple[Growth, ...]:
        """From each number of layers to the next, for each shape and method."""
        return tuple(
            Growth(b.shape, b.method, (a.layers, b.layers), b.cpu_seconds / a.cpu_seconds)
            for some in _by_method(self.runs).values()
            for a, b in pairwise(sorted(some, key=lambda run: run.layers))
        )

    @property
    def beside(self) -> tuple[Beside, ...]:
        """Planning beside the other methods, at each shape and number of layers."""
        found = {(run.shape, run.layers, run.method): run for run in self.runs if not run.failed}
        return tuple(
            Beside(shape, layers, method, planned.cpu_seconds / other.cpu_seconds)
            for (shape, layers, method), other in found.items()
            if method != "planned"
            and (planned := found.get((shape, layers, "planned"))) is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "environment": self.environment,
            "settings": asdict(self.settings),
            "runs": [run.to_dict() for run in self.runs],
            "growth": [asdict(one) for one in self.growth],
            "beside": [asdict(one) for one in self.beside],
        }

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> ScaleBench:
        """The inverse of :meth:`to_dict`."""
        runs = tuple(ScaleRun.from_dict(one) for one in plain["runs"])
        return ScaleBench(dict(plain["environment"]), Settings(**plain["settings"]), runs)


def counted(layers: int) -> str:
    """``1 layer``, ``2 layers``."""
    return "1 layer" if layers == 1 else f"{layers} layers"


def _by_method(runs: Sequence[ScaleRun]) -> dict[tuple[str, Method], list[ScaleRun]]:
    found: dict[tuple[str, Method], list[ScaleRun]] = {}
    for run in runs:
        if not run.failed:
            found.setdefault((run.shape, run.method), []).append(run)
    return found


def jobs(
    shapes: Sequence[str], layers: Sequence[int] | None, settings: Settings
) -> tuple[Job, ...]:
    """What is to be measured; ``layers`` None is each shape's own number.

    Raises :class:`ConfigError` for what is no shape or no number of layers, for windows longer than
    a model reads, and for a model whose weights do not fit into the memory that is free.
    """
    if layers is not None and (not layers or min(layers) < 1):
        raise ConfigError(
            f"--layers: expected numbers of at least 1, such as 2,4; found "
            f"{','.join(map(str, layers)) or 'none'}"
        )
    sized = [
        shape.with_layers(count)
        for shape in dict.fromkeys(map(ModelShape.parse, shapes))
        for count in sorted(set(layers or [shape.layers]))
    ]
    itemsize = dtype_of_name(settings.dtype).itemsize
    for shape in sized:
        if settings.length > shape.context:
            raise ConfigError(
                f"--length {settings.length}: {shape.name} reads at most {shape.context} tokens at "
                "once; give a smaller length"
            )
    for shape in sized:
        _check_fits(shape, itemsize, settings.dtype)
    return tuple(
        Job(shape.name, shape.layers, method, settings) for shape in sized for method in METHODS
    )


def _check_fits(shape: ModelShape, itemsize: int, dtype: str) -> None:
    """Weights alone that are more than the memory that is free."""
    there, needed = free(), shape.parameters() * itemsize
    if needed > there:
        ways = "fewer --layers" if itemsize < 4 else "--dtype bfloat16, fewer --layers"
        raise ConfigError(
            f"--shape {shape.name}: the weights of {counted(shape.layers)} in {dtype} are "
            f"{shown(needed)}, and {shown(there)} of memory are free; give {ways} or a smaller "
            "shape"
        )


@stage("bench scale", _LOG)
def bench_scale(
    shapes: Sequence[str] = ("gpt2",),
    layers: Sequence[int] | None = None,
    settings: Settings | None = None,
    *,
    run: Callable[[Job], ScaleRun] = in_own_process,
) -> ScaleBench:
    """Measure every shape at every number of layers by every method, one after the other.

    ``run`` carries out a job; in this process it is :func:`fxshare.bench.scale.measure.measure`,
    where the peak memory is that of everything before as well. Raises as :func:`jobs` does.
    """
    settings = settings or Settings()
    todo = jobs(shapes, layers, settings)
    return ScaleBench(environment(), settings, tuple(_runs(todo, run)))


def _runs(todo: Sequence[Job], run: Callable[[Job], ScaleRun]) -> Iterator[ScaleRun]:
    for job in todo:
        which = f"{job.shape}, {counted(job.layers)}, {job.method}"
        with stage(f"bench scale: {which}", _LOG) as running:
            found = run(job)
            running.found(found.failed or f"{found.cpu_seconds:.1f} s of the processor")
        yield found


__all__ = ["Beside", "Growth", "ScaleBench", "bench_scale", "counted", "jobs"]
