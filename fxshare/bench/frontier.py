"""``fxshare bench frontier``: held-out loss against bytes, for rounding, ranks, hidden units, and
all of them together.

The model is cast to bfloat16, and shares are of the bytes that its matched weights have then; bytes
are counted in the saved folder. Losses are computed in float32: of a language model nats per token
above dense, on one corpus or two, of an encoder how far sentence embeddings turn, one less the mean
cosine. Every method sees the same calibration tokens.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxshare.base.machine import environment, interleaved, median_seconds
from fxshare.base.progress import stage
from fxshare.bench.encoder import embeddings
from fxshare.bench.perplexity import evaluate
from fxshare.bench.quality import Case
from fxshare.capture import quiet
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import FxShareWarning, PlanError
from fxshare.factors.rounding import nearest
from fxshare.result.module import ShareModule, record_of
from fxshare.rewriting.lowering import lower
from fxshare.sites.tensors import dense_weights, substitute
from fxshare.store.save import save
from fxshare.verifying.evaluated import evaluated
from passes import structure_copy

_LOG = logging.getLogger(__name__)
SIZES = (0.5, 0.4, 0.33, 0.28, 0.25, 0.2, 0.15)
EVERYTHING = "everything"
_PLANNED: Mapping[str, Mapping[str, Any]] = {
    "bases": {"kinds": ["basis"]},
    "bases, 8 bits": {"kinds": ["basis"], "bits": [8]},
    "units": {"kinds": ["units"]},
    EVERYTHING: {"kinds": ["basis", "units", "heads"], "bits": [16, 8, 4]},
}


@dataclass(frozen=True)
class Row:
    """One method. ``size`` is the share that was allowed (None where the method has one size),
    ``kept`` what the file takes; losses are increases in nats per token."""

    case: str
    method: str
    size: float | None
    kept: float
    increase: float
    second: float | None
    predicted: float | None
    seconds: float
    prompt: float | None = None
    one: float | None = None
    """Tokens a second of a prompt and of one token alone, where they were measured, over those of
    the dense model in turn with it."""


@dataclass(frozen=True)
class Texts:
    """An encoder with its configuration's weight types, and batches of ids with a mask."""

    name: str
    model: nn.Module
    weight_types: Mapping[str, Any]
    calibration: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Frontier:
    """All rows, and what they were measured on."""

    environment: dict[str, object]
    seed: int
    search: str
    dense_loss: dict[str, float]
    rows: tuple[Row, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def best(self, case: str, size: float, *, alone: bool = False) -> Row | None:
        """What loses least at no more than a share of the bytes; with ``alone`` of single
        methods."""
        fits = [
            row
            for row in self.rows
            if row.case == case and (row.kept if row.size is None else row.size) <= size + 5e-3
        ]
        fits = [row for row in fits if not (alone and row.method == EVERYTHING)]
        return min(fits, key=lambda row: row.increase, default=None)


@dataclass(frozen=True, eq=False)
class _Bench:
    """A case, its model in bfloat16, and the folder that keeps its statistics."""

    case: Case | Texts
    model: nn.Module
    batches: Sequence[Any]
    second: Tensor | None
    work: Path
    seed: int
    speed: bool

    def losses(self, model: nn.Module) -> tuple[float, float | None]:
        """On both held-out sets, in float32."""
        wide = evaluated(model, True)
        with quiet():
            if isinstance(self.case, Texts):
                cosines = (embeddings(wide, self.case.held_out) * self.embedded).sum(-1)
                return 1 - float(cosines.mean()), None
            first = evaluate(wide, self.case.held_out).nll
            return first, None if self.second is None else evaluate(wide, self.second).nll

    @cached_property
    def embedded(self) -> Tensor:
        """The dense model's embeddings."""
        assert isinstance(self.case, Texts)
        return embeddings(evaluated(self.model, True), self.case.held_out)

    @cached_property
    def dense(self) -> tuple[float, float | None]:
        """What the dense model loses on them."""
        return self.losses(self.model)

    def speeds(self, model: nn.Module) -> tuple[float | None, float | None]:
        """Of a prompt and of one token, over the dense model's; packed for speed, in eager mode."""
        if not self.speed or isinstance(self.case, Texts):
            return None, None
        packed = lower(model, prefer="speed") if isinstance(model, ShareModule) else model
        found = []
        for ids in (self.case.held_out[:1], self.case.held_out[:1, :1]):
            with quiet(), torch.no_grad():
                times = interleaved(
                    {"dense": partial(self.model, ids), "own": partial(packed, ids)}, repeats=9
                )
            found.append(median_seconds(times["dense"]) / median_seconds(times["own"]))
        return found[0], found[1]

    def row(
        self, method: str, size: float | None, model: nn.Module, kept: float, began: float
    ) -> Row:
        """What a model loses."""
        outlook = getattr(getattr(model, "fxshare", None), "plan", None)
        predicted = outlook.outlook.predicted if outlook and outlook.outlook else None
        first, second = self.losses(model)
        gap = None if second is None or self.dense[1] is None else second - self.dense[1]
        seconds = time.perf_counter() - began
        increase = first - self.dense[0]
        speeds = self.speeds(model)
        return Row(self.case.name, method, size, kept, increase, gap, predicted, seconds, *speeds)

    def planned(self, size: float, planner: Mapping[str, Any]) -> nn.Module:
        """The plan of a budget."""
        extra = {"budget": {"bytes_kept": size}, "planner": dict(planner)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxShareWarning)
            return compile_model(
                self.model,
                [dict(self.case.weight_types), extra],
                calibration=self.batches,
                seed=self.seed,
                work=self.work,
            )


@stage("bench frontier", _LOG)
def bench_frontier(
    cases: Sequence[Case | Texts],
    *,
    sizes: Sequence[float] = SIZES,
    second: Mapping[str, Tensor] | None = None,
    batch: int = 8,
    search: str = "off",
    speed: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Frontier:
    """Measure every method on every case at every size. ``second`` are tokens of another corpus, by
    the names of cases; ``speed`` also measures tokens a second of language models, which is
    slow."""
    start = time.perf_counter()
    rows: list[Row] = []
    dense: dict[str, float] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as work:
            bench = _bench_of(case, (second or {}).get(case.name), batch, Path(work), (seed, speed))
            dense[case.name] = bench.dense[0]
            what = "1 - cosine" if isinstance(case, Texts) else "nats per token"
            say(f"{case.name}: dense {bench.dense[0]:.4f} {what}, bfloat16")
            for row in _rows(bench, sizes, search):
                what = "" if row.size is None else f" {row.size:.2f}"
                say(
                    f"{case.name}{what} {row.method}: {row.kept:.3f} of the bytes, "
                    f"+{row.increase:.4f}"
                )
                rows.append(row)
    seconds = time.perf_counter() - start
    return Frontier(environment(), seed, search, dense, tuple(rows), seconds)


def _bench_of(
    case: Case | Texts, second: Tensor | None, batch: int, work: Path, how: tuple[int, bool]
) -> _Bench:
    model = structure_copy(case.model, clone_parameters=True).bfloat16()
    given = case.calibration
    batches = list(torch.split(given, batch)) if isinstance(given, Tensor) else list(given)
    return _Bench(case, model, batches, second, work / "work", *how)


def _rows(bench: _Bench, sizes: Sequence[float], search: str) -> Iterator[Row]:
    for bits in (8, 4):
        began = time.perf_counter()
        options = {"kinds": ["units"], "bits": [bits], "search": "off", "floor": 0.0}
        gm = bench.planned(1.0, options)
        kept = bytes_in_file(bench.model, gm)
        yield bench.row(f"dense, {bits} bits, feedback", None, gm, kept, began)
        began = time.perf_counter()
        plain = _nearest(bench.model, gm, bits)
        yield bench.row(f"dense, {bits} bits, nearest", None, plain, kept, began)
    for size in sizes:
        for method, planner in _PLANNED.items():
            began = time.perf_counter()
            try:
                gm = bench.planned(size, {**planner, "search": search})
            except PlanError as error:
                _LOG.info("%s %.2f: no plan, %s", method, size, error)
                continue
            kept = bytes_in_file(bench.model, gm)
            yield bench.row(method, size, gm, kept, began)


def _nearest(model: nn.Module, gm: nn.Module, bits: int) -> nn.Module:
    """The model with the nearest codes' values for its matched weights."""
    copy = structure_copy(model)
    sites = record_of(gm).plan.sites
    weights = dense_weights(model, sites)
    values = {
        name: nearest(weight.double(), bits, weight.dtype).values(torch.float64)
        for name, weight in weights.items()
    }
    substitute(copy, sites, values, {})
    return copy


def bytes_in_file(model: nn.Module, gm: nn.Module) -> float:
    """Stored bytes of the matched linears in the saved folder over those of their dense weights."""
    plan = record_of(gm).plan
    stored = 0
    with tempfile.TemporaryDirectory() as folder:
        save(gm, Path(folder) / "saved")
        for file in sorted((Path(folder) / "saved").glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    stored += opened.get_tensor(name).nbytes
    everything = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    before = 2 * plan.dense_numbers
    return (stored - (sum(everything.values()) - before)) / before


def table_of(
    result: Frontier, sizes: Sequence[float], *, second: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per case and size, with what loses least named, and what everything
    loses over the best single method. ``second`` tells of the second corpus, where the winners are
    those of the first."""
    methods = list(dict.fromkeys(row.method for row in result.rows if row.size is not None))
    header = ["model", "bytes kept", *methods, "dense in bits", "least", "everything / best single"]

    def told(row: Row | None) -> str:
        increase = None if row is None else row.second if second else row.increase
        return "–" if increase is None else f"{increase:.4f}"

    rows = []
    for case in result.dense_loss:
        if second and not any(row.case == case and row.second is not None for row in result.rows):
            continue
        for size in sizes:
            by = {r.method: r for r in result.rows if (r.case, r.size) == (case, size)}
            fixed = [
                r
                for r in result.rows
                if r.case == case and r.size is None and r.kept <= size + 5e-3
            ]
            rounded = min(fixed, key=lambda r: r.increase, default=None)
            best, alone = result.best(case, size), result.best(case, size, alone=True)
            cells = [told(by.get(m)) for m in methods] + [told(rounded)]
            every = by.get(EVERYTHING)
            ratio = "–"
            if every is not None and alone is not None and alone.increase > 0:
                ratio = f"{every.increase / alone.increase:.2f}"
            named = "–" if best is None else best.method
            rows.append([case, f"{size:.2f}", *cells, named, ratio])
    return header, rows


def speed_table(result: Frontier) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was timed, over dense."""
    header = ["model", "bytes kept", "method", "prompt", "one token"]
    return header, [
        [r.case, f"{r.kept:.3f}", r.method, f"{r.prompt:.2f}", f"{r.one:.2f}"]
        for r in result.rows
        if r.prompt is not None and r.one is not None
    ]


__all__ = [
    "EVERYTHING",
    "SIZES",
    "Frontier",
    "Row",
    "Texts",
    "bench_frontier",
    "bytes_in_file",
    "speed_table",
    "table_of",
]
