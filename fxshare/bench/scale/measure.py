"""One run of the benchmark in this process: a model, a method, and what each stage took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxshare.base.spent import Spent, part, peak_bytes, recording
from fxshare.bench.speed.device import dtype_of_name, threads
from fxshare.calibration.losses import default_loss
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import ConfigError, FxShareWarning
from fxshare.estimating.estimate import estimate
from fxshare.estimating.stages import Estimate, StageEstimate
from fxshare.models.shapes import ModelShape
from fxshare.proposing.propose import init
from fxshare.result.module import record_of

Method = Literal["planned", "basis sharing", "forward and backward"]
METHODS: tuple[Method, ...] = get_args(Method)
SPLITS = ("heads", "qkv", "false")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common: the data, how much is kept, and how it is computed.

    ``split`` is how a fused projection of q, k and v is divided; models without one ignore it.
    """

    tokens: int = 8192
    length: int = 512
    batch_size: int = 1
    keep: float = 0.8
    dtype: str = "float32"
    threads: int = 1
    split: str = "heads"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError(
                f"--keep: expected a share of the numbers above 0 and below 1; found {self.keep:g}"
            )
        if self.split not in SPLITS:
            raise ConfigError(f"--split: expected {' or '.join(SPLITS)}; found {self.split!r}")
        for name, value, least in (
            ("--length", self.length, 2),
            ("--batch-size", self.batch_size, 1),
            ("--threads", self.threads, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}; found {value}")
        dtype_of_name(self.dtype)
        # a search holds a batch back to judge plans with
        least = 2 * self.length * self.batch_size
        if self.tokens < least:
            raise ConfigError(
                f"--tokens: expected at least {least:,}, two batches of {self.batch_size} windows "
                f"of {self.length} tokens, of which one is held back; found {self.tokens:,}. Give "
                "more, or a smaller --length"
            )


@dataclass(frozen=True)
class Job:
    """One model and one method. ``shape`` is as :meth:`ModelShape.parse` reads it."""

    shape: str
    layers: int
    method: Method
    settings: Settings


@dataclass(frozen=True)
class ScaleRun:
    """What a run took. ``cpu_seconds`` are those of the method, without the making of the model;
    ``stages`` add up to them. ``peak_bytes`` is the most memory that the process held during the
    method, and ``model_bytes`` the most until then: imports, and making the model."""

    shape: str
    layers: int
    method: Method
    parameters: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    model_bytes: int = 0
    peak_bytes: int = 0
    kept: float | None = None
    stages: tuple[Spent, ...] = ()
    estimated: tuple[StageEstimate, ...] = ()
    """What :func:`fxshare.estimate` said beforehand of its stages, and of the peak."""
    estimated_bytes: int = 0
    failed: str = ""
    """Why there are no figures."""

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> ScaleRun:
        """The inverse of ``asdict``."""
        stages = tuple(Spent(**one) for one in plain["stages"])
        estimated = tuple(StageEstimate(**one) for one in plain.get("estimated", ()))
        return ScaleRun(**{**plain, "stages": stages, "estimated": estimated})

    def to_dict(self) -> dict[str, Any]:
        """The run as plain data."""
        lists = {
            "stages": [asdict(one) for one in self.stages],
            "estimated": [asdict(one) for one in self.estimated],
        }
        return {**asdict(self), **lists}


def measure(job: Job) -> ScaleRun:
    """Make the model and run the method on it, once; random token ids are its data."""
    settings = job.settings
    shape = ModelShape.parse(job.shape).with_layers(job.layers)
    with threads(settings.threads), warnings.catch_warnings():
        # what a user should know of his data is no news about random numbers
        warnings.simplefilter("ignore", FxShareWarning)
        model = shape.model(dtype_of_name(settings.dtype), seed=settings.seed)
        parameters = sum(p.numel() for p in model.parameters())
        work = partial(_METHODS[job.method], model, _batches(shape, settings), settings)
        foretold = _estimated(model, job)
        before = peak_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        with recording() as spent:
            kept = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stages = _merged(spent.stages())
    return ScaleRun(
        shape=shape.name,
        layers=shape.layers,
        method=job.method,
        parameters=parameters,
        cpu_seconds=cpu,
        seconds=wall,
        model_bytes=before,
        peak_bytes=max(one.peak_bytes for one in stages),
        kept=kept,
        stages=stages,
        estimated=() if foretold is None else foretold.stages,
        estimated_bytes=0 if foretold is None else foretold.memory,
    )


def _estimated(model: nn.Module, job: Job) -> Estimate | None:
    """What the compilation would take, by an estimate that has not seen it."""
    mode, settings = _modes(job.settings).get(job.method), job.settings
    if mode is None:
        return None
    return estimate(
        model,
        [types_of(model, settings.split), mode],
        tokens=settings.tokens // settings.length * settings.length,
        length=settings.length,
        batch_size=settings.batch_size,
    )


def _modes(settings: Settings) -> Mapping[Method, Mapping[str, Any]]:
    return {
        "planned": {"budget": {"params_kept": settings.keep}},
        "basis sharing": {"group_size": 2, "compression_rate": settings.keep},
    }


def _batches(shape: ModelShape, settings: Settings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    windows = settings.tokens // settings.length
    ids = torch.randint(0, shape.vocabulary, (windows, settings.length), generator=generator)
    return list(torch.split(ids, settings.batch_size))


def types_of(model: nn.Module, split: str) -> dict[str, Any]:
    """The weight types that ``init`` finds, a fused projection of q, k and v divided as asked."""
    found = init(model).model_dump(include={"weight_types", "block_pattern"})
    for one in found["weight_types"].values():
        if one["split"] == "heads" and split == "qkv":
            one |= {"split": split, "n_head": None}
        elif one["split"] == "heads" and split == "false":
            one |= {"split": False, "n_head": None, "qkv_order": None}
    return found


def _compress(
    model: nn.Module, batches: list[Tensor], settings: Settings, *, mode: Mapping[str, Any]
) -> float:
    gm = compile_model(model, [types_of(model, settings.split), mode], calibration=batches)
    return record_of(gm).report.params_kept


def _planned(model: nn.Module, batches: list[Tensor], settings: Settings) -> float:
    return _compress(model, batches, settings, mode=_modes(settings)["planned"])


def _basis_sharing(model: nn.Module, batches: list[Tensor], settings: Settings) -> float:
    return _compress(model, batches, settings, mode=_modes(settings)["basis sharing"])


def _forward_and_backward(model: nn.Module, batches: list[Tensor], settings: Settings) -> None:
    """One pass over the data with the gradients of all weights, as a step of training takes it."""
    del settings
    for ids in batches:
        with part("forward"):
            loss, _ = default_loss(model(input_ids=ids, use_cache=False), {"input_ids": ids})
        with part("backward"):
            torch.autograd.backward(loss)


_METHODS: Mapping[Method, Callable[[nn.Module, list[Tensor], Settings], float | None]] = {
    "planned": _planned,
    "basis sharing": _basis_sharing,
    "forward and backward": _forward_and_backward,
}


def _merged(stages: tuple[Spent, ...]) -> tuple[Spent, ...]:
    """The rounds of a search as one stage; each says in its name which it is."""
    found: dict[str, Spent] = {}
    for one in stages:
        name = "search" if one.name.startswith("plan: searching") else one.name
        old = found.get(name, Spent(name, 0, 0.0, 0.0, 0))
        found[name] = Spent(
            name,
            old.runs + one.runs,
            old.cpu_seconds + one.cpu_seconds,
            old.seconds + one.seconds,
            max(old.peak_bytes, one.peak_bytes),
        )
    return tuple(found.values())


__all__ = ["METHODS", "Job", "Method", "ScaleRun", "Settings", "measure", "types_of"]
