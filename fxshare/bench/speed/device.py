"""``fxshare bench device``: the constants that the cost model needs, measured on this machine."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshare.base.progress import stage
from fxshare.cost_model import Rates, launches
from fxshare.cost_model.device import device_name, threads_of
from fxshare.cost_model.recorder import record_step
from fxshare.errors import ConfigError, FxShareWarning

_LOG = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
WIDTHS = (16, 64, 256, 1024, 4096)
WORKING_SETS = tuple(n << 20 for n in (1, 8, 64, 256))
ROWS, INNER = 512, 1024
_CHAIN, _BLOCKS, _WIDTH = 64, 8, 1024
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_of_name(name: str) -> torch.dtype:
    """The dtype of an option; :class:`ConfigError` for one that models are not run in."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(_DTYPES)}; found {name!r}")
    return _DTYPES[name]


def device_of_name(name: str) -> torch.device:
    """The device of an option; :class:`ConfigError` where this machine has none such."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda; found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: cuda was asked for, and torch finds no CUDA device here; use cpu"
        )
    return torch.device(name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` processor threads, 0 for those in use; as before afterwards."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@stage("bench device", _LOG)
def bench_device(
    *,
    device: str = "cpu",
    dtype: str = "float32",
    repeats: int = 15,
    widths: Sequence[int] | None = None,
    working_sets: Sequence[int] | None = None,
    compiled: bool = True,
) -> Rates:
    """Measure FLOP/s by narrowest dimension, bandwidth by working set, launches, and the entry of a
    compiled pass.

    The points are :data:`WIDTHS` and :data:`WORKING_SETS` (bytes) where None.

    ``compiled`` measures a launch under ``torch.compile`` too; where there is no compiler the eager
    one is taken, with a :class:`FxShareWarning`.

    Raises :class:`ConfigError` for a device or dtype that is not there.
    """
    place, kind = device_of_name(device), dtype_of_name(dtype)
    widths = WIDTHS if widths is None else widths
    working_sets = WORKING_SETS if working_sets is None else working_sets
    with torch.no_grad():
        work = {("matmul", n): _products(place, kind, n) for n in widths}
        work |= {("bandwidth", n): _rows(place, kind, n) for n in working_sets}
        times = quickest({key: call for key, (call, _) in work.items()}, place, repeats)
        rates = {key: amount / times[key] for key, (_, amount) in work.items()}
        launch, launch_compiled, entry = _launches(place, kind, repeats, compiled=compiled)
    return Rates(
        device=device,
        name=device_name(place),
        dtype=dtype,
        threads=threads_of(place),
        element_size=kind.itemsize,
        matmul=tuple((n, rates["matmul", n]) for n in widths),
        bandwidth=tuple((n, rates["bandwidth", n]) for n in working_sets),
        launch=launch,
        launch_compiled=launch_compiled,
        entry=entry,
        torch=torch.__version__,
    )


Work = tuple[Callable[[], None], int]
"""A call, and the FLOPs or bytes of it."""


def _products(device: torch.device, dtype: torch.dtype, width: int) -> Work:
    """A product into ``width`` features and one out of them: a basis and its coefficients."""
    x = numbers(device, dtype, ROWS, INNER)
    z = numbers(device, dtype, ROWS, width)
    into, out_of = (numbers(device, dtype, *s) for s in ((width, INNER), (INNER, width)))

    def both() -> None:
        F.linear(x, into)
        F.linear(z, out_of)

    return both, 2 * 2 * ROWS * INNER * width


def _rows(device: torch.device, dtype: torch.dtype, working_set: int) -> Work:
    """One row through matrices of at most 4 MB that make up the working set, in turn."""
    height = max(min(working_set // dtype.itemsize, 1 << 20) // INNER, 1)
    count = max(working_set // (height * INNER * dtype.itemsize), 1)
    weights = [numbers(device, dtype, height, INNER) for _ in range(count)]
    x = numbers(device, dtype, 1, INNER)

    def all_of_them() -> None:
        for weight in weights:
            F.linear(x, weight)

    return all_of_them, count * height * INNER * dtype.itemsize


class _Chain(nn.Module):
    """Tiny linears, one after the other."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight)
        return x


class _Block(nn.Module):
    """What a layer of a model has between its products, and products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return added


class _Empty(nn.Module):
    """A pass of one operation that has nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _launches(
    device: torch.device, dtype: torch.dtype, repeats: int, *, compiled: bool
) -> tuple[float, float, float]:
    """Seconds of a launch, eager and compiled, and of entering a compiled pass."""
    x = numbers(device, dtype, 1, 8)
    chain = _Chain([numbers(device, dtype, 8, 8) for _ in range(_CHAIN)]).eval()
    eager = quickest({"eager": lambda: chain(x)}, device, repeats)["eager"] / _CHAIN
    if not compiled:
        return eager, eager, 0.0
    try:
        return eager, *_compiled_launches(device, dtype, repeats, eager)
    except Exception as error:  # whatever a compiler that is missing makes inductor raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"torch.compile does not work here ({reason}): launches under it are taken to "
            "cost as much as eager ones",
            FxShareWarning,
            stacklevel=3,
        )
        return eager, eager, 0.0


def _compiled_launches(
    device: torch.device, dtype: torch.dtype, repeats: int, eager: float
) -> tuple[float, float]:
    """Seconds of a launch and of the entry: what a compiled pass takes beyond its products.

    Between two launches stand products of 4 MB and more, as in a model: they drive out of the
    caches what a launch and a guard need, and both take a multiple of what they take alone.
    """
    width = _WIDTH
    x = numbers(device, dtype, 1, width)
    with torch.random.fork_rng(devices=[]):
        blocks = nn.Sequential(*(_Block(width) for _ in range(_BLOCKS))).eval().to(device, dtype)
    linears = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    fast, empty = (torch.compile(each, dynamic=False) for each in (blocks, _Empty()))

    def products() -> None:
        for linear in linears:
            F.linear(x, linear.weight, linear.bias)

    calls = {"pass": lambda: fast(x), "products": products, "empty": lambda: empty(x)}
    # what is left is a tenth of both, so that it takes more rounds
    times = quickest(calls, device, 3 * repeats, median=True)
    rest = times["pass"] - times["empty"] - times["products"] + eager * len(linears)
    count = launches(record_step(blocks, {"input": x}), compiled=True)
    return max(rest / count, eager), times["empty"]


def numbers(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random ones, the same at every call."""
    # small, so that a chain of products neither overflows nor gets so small that it is slow
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).div(INNER**0.5).to(device, dtype)


def quickest(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    repeats: int,
    *,
    median: bool = False,
) -> dict[Key, float]:
    """The least seconds of each call: other work on the machine only ever adds to them. Or their
    ``median``, which is what a model is measured by.

    They are timed in turn, so that a machine that gets busy slows all alike, and each time takes
    at least 10 ms, so that the clock does not matter.
    """
    numbers = {}
    for key, call in calls.items():
        call()
        numbers[key] = max(int(0.01 / max(_timed(call, device, 1), 1e-9)), 1)
    rounds = [
        {key: _timed(call, device, numbers[key]) for key, call in calls.items()}
        for _ in range(repeats)
    ]
    pick = statistics.median if median else min
    return {key: pick(times[key] for times in rounds) for key in calls}


def _timed(call: Callable[[], object], device: torch.device, number: int) -> float:
    clock = clock_of(device)
    synchronise(device)
    start = clock()
    for _ in range(number):
        call()
    synchronise(device)
    return (clock() - start) / number


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that speed is told by: of one thread on a CPU its own processor seconds, in which
    other work on the machine does not count, else the clock on the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rates: Rates) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = [[f"matmul, {n} wide", f"{rate / 1e9:,.1f} GFLOP/s"] for n, rate in rates.matmul]
    rows += [
        [f"one row, {n / 2**20:g} MB of weights", f"{rate / 1e9:,.1f} GB/s"]
        for n, rate in rates.bandwidth
    ]
    rows += [
        ["launch, eager", f"{rates.launch * 1e6:.2f} µs"],
        ["launch, compiled", f"{rates.launch_compiled * 1e6:.2f} µs"],
        ["entry of a compiled pass", f"{rates.entry * 1e6:.2f} µs"],
    ]
    count = len(rates.measured.products) + len(rates.measured.attentions)
    if count:
        rows.append(["products and attentions of models", f"{count:,} shapes"])
    return ["constant", "measured"], rows
