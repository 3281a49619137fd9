"""The constants that estimates are made with: measured here, published, or assumed."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from fxshare.base.files import write_text
from fxshare.base.json_text import parse_json
from fxshare.cost_model.device import device_name, threads_of
from fxshare.cost_model.pace import Origin, Pace
from fxshare.cost_model.rates import Points, rates_path
from fxshare.errors import ConfigError, StoreError

VERSION = 1
_WIDTHS = (32, 128, 512)
_ROWS = 512
_TENSORS = (1 << 20, 1 << 26)
"""Bytes of what is copied to tell how fast memory is."""
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_ROUNDS = 2
"""In turn, of which the faster counts: other work on the machine comes and goes."""
_FRESH = 24 * 3600
"""Seconds for which what was measured before still counts where it was faster."""
_PUBLISHED = {
    # dense FLOP/s in half precision, float32 (TF32 where products may use it: off by default),
    # float64 with and without tensor cores, and bytes/s, of the makers' data sheets
    "a100": (312e12, 19.5e12, 19.5e12, 9.7e12, 2.0e12),
    "h100": (989e12, 67e12, 67e12, 34e12, 3.35e12),
    "h200": (989e12, 67e12, 67e12, 34e12, 4.8e12),
    "l4": (121e12, 30e12, 0.49e12, 0.49e12, 0.3e12),
    "t4": (65e12, 8.1e12, 0.25e12, 0.25e12, 0.32e12),
    "v100": (125e12, 15.7e12, 7.8e12, 7.8e12, 0.9e12),
    "rtx4090": (165e12, 82.6e12, 1.29e12, 1.29e12, 1.01e12),
}
"""By name of ``--device``; ``cuda`` where there is none is the first."""
_IN_USE = 1.25
"""Times what is measured alone and again and again: between other work all takes longer."""
_EFFICIENCY = 0.5
"""Of a published peak, what large products reach."""
_EIGEN = 0.04
"""Of it, what eigenproblems reach: half of their arithmetic is bound by memory."""


def devices() -> tuple[str, ...]:
    """The names that :func:`pace_for` knows."""
    return ("cpu", "cuda", *_PUBLISHED)


def pace_for(device: str = "cpu", dtype: str = "float32") -> Pace:
    """The constants of a device: measured here once a process, in a few seconds; of one that is
    not here those that were measured before, or from published peak rates.

    Raises :class:`ConfigError` for a device that has neither.
    """
    if device not in devices():
        raise ConfigError(
            f"--device: expected one of {', '.join(devices())}; found {device!r}. Of another one, "
            "'fxshare estimate' measures its rates where it runs on it: --device cuda"
        )
    dtype_named(dtype)
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return measured(device, dtype, threads_of(torch.device(device)))
    return _published("a100" if device == "cuda" else device, dtype)


def pace_at_hand(device: str, dtype: str) -> Pace:
    """The constants of a device without measuring anything: those of an earlier estimate, or some
    that are seldom too fast."""
    place = torch.device("cuda" if device == "cuda" else "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        return _assumed(device, dtype, 1)
    found = _read(_path(place, dtype, threads_of(place)))
    return _assumed(device, dtype, threads_of(place)) if found is None else found


@functools.cache
def measured(device: str, dtype: str, threads: int) -> Pace:
    """Measure this machine, and keep the constants in the user's cache folder, where a compilation
    finds them. What was measured in the last day counts where it was faster: other work on the
    machine only ever slows it."""
    place = torch.device(device)
    path = _path(place, dtype, threads)
    with torch.no_grad():
        rounds = [_measured(place, dtype, threads) for _ in range(_ROUNDS)]
    first = _fresh_since(path)
    before = _read(path) if first is not None else None
    made = functools.reduce(_faster, [*rounds, *([before] if before is not None else [])])
    try:
        plain = {"version": VERSION, **asdict(made)}
        write_text(path, json.dumps(plain, indent=1) + "\n")
        if before is not None and first is not None:
            os.utime(path, (first, first))  # or what was once measured would count for ever
    except (OSError, StoreError):  # the next process measures again
        pass
    return made


def _measured(place: torch.device, dtype: str, threads: int) -> Pace:
    return Pace(
        device=place.type,
        name=device_name(place),
        dtype=dtype,
        threads=threads,
        origin="measured",
        model=_products(place, dtype_named(dtype)),
        single=_products(place, torch.float32),
        double=_products(place, torch.float64),
        eigh=_cubes(place, torch.linalg.eigh, (64, 256, 768)),
        eigvalsh=_cubes(place, torch.linalg.eigvalsh, (64, 256, 768, 1536)),
        cholesky=_cubes(place, torch.linalg.cholesky, (64, 256, 1024)),
        traffic=_traffic(place),
        call=_call(place),
    )


def _faster(one: Pace, other: Pace) -> Pace:
    """The better of both at every point."""
    points: dict[str, Any] = {}
    for field in fields(Pace):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, tuple):
            best = dict(theirs) | {n: max(rate, dict(theirs).get(n, rate)) for n, rate in mine}
            points[field.name] = tuple(sorted(best.items()))
    return replace(one, **points, call=min(one.call, other.call))


def _fresh_since(path: Path) -> float | None:
    """When the first of what a file has was measured, where that still counts."""
    try:
        first = path.stat().st_mtime
    except OSError:
        return None
    return first if time.time() - first < _FRESH else None


def _path(place: torch.device, dtype: str, threads: int) -> Path:
    path = rates_path(place.type, device_name(place), dtype, threads)
    return path.with_name(f"pace-{path.name}")


def _read(path: Path) -> Pace | None:
    try:
        data: Any = parse_json(path.read_bytes())
        if data.pop("version") != VERSION:
            return None
        points = {k: tuple((int(n), float(r)) for n, r in v) for k, v in data.items() if _many(v)}
        made = Pace(**{**data, **points})
        rates = [rate for some in points.values() for _, rate in some]
        return made if all(0 < one < float("inf") for one in (*rates, made.call)) else None
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None  # it is measured again by the next estimate


def _many(value: object) -> bool:
    return isinstance(value, (list, tuple))


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name; :class:`ConfigError` for one that models are not run in."""
    if name not in _DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(_DTYPES)}; found {name!r}")
    return _DTYPES[name]


def _products(place: torch.device, dtype: torch.dtype) -> Points:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_ROWS, 1024, generator=generator).to(place, dtype)
    found = []
    for width in _WIDTHS:
        right = torch.randn(1024, width, generator=generator).to(place, dtype)
        seconds = _seconds(place, lambda right=right: left @ right)  # type: ignore[misc]
        found.append((width, 2 * _ROWS * 1024 * width / seconds))
    return tuple(found)


def _cubes(
    place: torch.device, work: Callable[[torch.Tensor], object], sizes: tuple[int, ...]
) -> Points:
    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(size, size, generator=generator, dtype=torch.float64).to(place)
        moment = rows @ rows.T
        moment.diagonal().add_(1.0)
        found.append((size, size**3 / _seconds(place, lambda m=moment: work(m))))  # type: ignore[misc]
    return tuple(found)


def _traffic(place: torch.device) -> Points:
    found = []
    for size in _TENSORS:
        x = torch.ones(size // 8, dtype=torch.float32, device=place)
        y = torch.empty_like(x)
        found.append((size, size / _seconds(place, lambda x=x, y=y: torch.mul(x, 2, out=y))))  # type: ignore[misc]
    return tuple(found)


def _call(place: torch.device) -> float:
    x = torch.zeros(1, device=place)
    return _seconds(place, lambda: [x + 1 for _ in range(100)]) / 100


def _seconds(place: torch.device, call: Callable[[], object]) -> float:
    """The least of a few; on the CPU processor seconds by thread, which other work on the machine
    hardly lengthens."""
    gpu = place.type == "cuda"

    def clock() -> float:
        if gpu:
            torch.cuda.synchronize(place)
            return time.perf_counter()
        return time.process_time() / max(torch.get_num_threads(), 1)

    call()
    best, spent = float("inf"), 0.0
    for _ in range(5):
        number, start = 0, clock()
        while number == 0 or (clock() - start < 0.003 and number < 1000):
            call()
            number += 1
        took = clock() - start
        best, spent = min(best, took / number), spent + took
        if spent > 0.05:
            break
    return max(best, 1e-9) * _IN_USE


def _published(device: str, dtype: str) -> Pace:
    half, single, double, plain_double, memory = _PUBLISHED[device]
    model = {"float32": single, "float64": double}.get(dtype, half)
    return _made(
        device,
        dtype,
        1,
        "published",
        (model * _EFFICIENCY, single * _EFFICIENCY, double * _EFFICIENCY),
        plain_double * _EIGEN,
        memory * 0.7,
        1e-5,
    )


def _assumed(device: str, dtype: str, threads: int) -> Pace:
    """Of a core of a few years ago, times threads."""
    if device == "cuda":
        return _published("t4", dtype)
    half = dtype in ("bfloat16", "float16")
    rates = 2e10 if half else 5e10, 5e10, 2.5e10
    products = tuple(rate * threads for rate in rates)
    assert len(products) == 3
    return _made(device, dtype, threads, "assumed", products, 3e10 * threads**0.5, 1e10, 5e-6)


def _made(
    device: str,
    dtype: str,
    threads: int,
    origin: Origin,
    products: tuple[float, float, float],
    eigen: float,
    memory: float,
    call: float,
) -> Pace:
    model, single, double = (
        ((32, rate * 0.3), (128, rate * 0.7), (512, rate)) for rate in products
    )
    return Pace(
        device=device,
        name=device,
        dtype=dtype,
        threads=threads,
        origin=origin,
        model=model,
        single=single,
        double=double,
        eigh=((64, eigen / 30), (256, eigen / 15), (1024, eigen / 9)),
        eigvalsh=((64, eigen / 12), (256, eigen / 6), (1024, eigen / 3)),
        cholesky=((64, products[2] / 12), (1024, products[2] / 3)),
        traffic=((1 << 20, memory), (1 << 26, memory)),
        call=call,
    )


__all__ = ["devices", "dtype_named", "measured", "pace_at_hand", "pace_for"]
