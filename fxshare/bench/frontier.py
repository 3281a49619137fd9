"""``fxshare bench frontier``: held-out loss against bytes, for rounding, ranks, hidden units, and
all of them together.

The model is cast to bfloat16, and shares are of the bytes that its matched weights have then; bytes
are counted in the saved folder. Losses are computed in float32. Every method sees the same
calibration tokens.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.bench.perplexity import evaluate
from fxshare.bench.quality import Case
from fxshare.capture import quiet
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import FxShareWarning, PlanError
from fxshare.factors.rounding import nearest
from fxshare.result.module import record_of
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
    EVERYTHING: {"kinds": ["basis", "units"], "bits": [16, 8, 4]},
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

    case: Case
    model: nn.Module
    batches: Sequence[Tensor]
    second: Tensor | None
    dense: tuple[float, float | None]
    work: Path
    seed: int

    def losses(self, model: nn.Module) -> tuple[float, float | None]:
        """On both held-out sets, in float32."""
        wide = evaluated(model, True)
        with quiet():
            first = evaluate(wide, self.case.held_out).nll
            return first, None if self.second is None else evaluate(wide, self.second).nll

    def row(
        self, method: str, size: float | None, model: nn.Module, kept: float, began: float
    ) -> Row:
        """What a model loses."""
        outlook = getattr(getattr(model, "fxshare", None), "plan", None)
        predicted = outlook.outlook.predicted if outlook and outlook.outlook else None
        first, second = self.losses(model)
        gap = None if second is None or self.dense[1] is None else second - self.dense[1]
        seconds = time.perf_counter() - began
        return Row(
            self.case.name, method, size, kept, first - self.dense[0], gap, predicted, seconds
        )

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
    cases: Sequence[Case],
    *,
    sizes: Sequence[float] = SIZES,
    second: Mapping[str, Tensor] | None = None,
    batch: int = 8,
    search: str = "off",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Frontier:
    """Measure every method on every case at every size. ``second`` are tokens of another corpus, by
    the names of cases."""
    start = time.perf_counter()
    rows: list[Row] = []
    dense: dict[str, float] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as work:
            bench = _bench_of(case, (second or {}).get(case.name), batch, Path(work), seed)
            dense[case.name] = bench.dense[0]
            say(f"{case.name}: dense {bench.dense[0]:.4f} nats per token, bfloat16")
            for row in _rows(bench, sizes, search):
                what = "" if row.size is None else f" {row.size:.2f}"
                say(
                    f"{case.name}{what} {row.method}: {row.kept:.3f} of the bytes, "
                    f"+{row.increase:.4f}"
                )
                rows.append(row)
    seconds = time.perf_counter() - start
    return Frontier(environment(), seed, search, dense, tuple(rows), seconds)


def _bench_of(case: Case, second: Tensor | None, batch: int, work: Path, seed: int) -> _Bench:
    model = structure_copy(case.model, clone_parameters=True).bfloat16()
    batches = list(torch.split(case.calibration, batch))
    bench = _Bench(case, model, batches, second, (0.0, None), work / "work", seed)
    return _Bench(case, model, batches, second, bench.losses(model), work / "work", seed)


def _rows(bench: _Bench, sizes: Sequence[float], search: str) -> Sequence[Row]:
    found: list[Row] = []
    for bits in (8, 4):
        began = time.perf_counter()
        options = {"kinds": ["units"], "bits": [bits], "search": "off", "floor": 0.0}
        gm = bench.planned(1.0, options)
        kept = bytes_in_file(bench.model, gm)
        found.append(bench.row(f"dense, {bits} bits, feedback", None, gm, kept, began))
        began = time.perf_counter()
        plain = _nearest(bench.model, gm, bits)
        found.append(bench.row(f"dense, {bits} bits, nearest", None, plain, kept, began))
    for size in sizes:
        for method, planner in _PLANNED.items():
            began = time.perf_counter()
            try:
                gm = bench.planned(size, {**planner, "search": search})
            except PlanError as error:
                _LOG.info("%s %.2f: no plan, %s", method, size, error)
                continue
            kept = bytes_in_file(bench.model, gm)
            found.append(bench.row(method, size, gm, kept, began))
    return found


def _nearest(model: nn.Module, gm: nn.Module, bits: int) -> nn.Module:
    """The model with the nearest codes' values for its matched weights."""
    copy = structure_copy(model)
    sites = tuple(site for site in record_of(gm).plan.sites if not site.lookups)
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


def table(result: Frontier, sizes: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per case and size, the winner last."""
    methods = list(dict.fromkeys(row.method for row in result.rows if row.size is not None))
    header = ["model", "bytes kept", *methods, "dense in bits", "least"]
    rows = []
    for case in result.dense_loss:
        for size in sizes:
            by = {r.method: r for r in result.rows if (r.case, r.size) == (case, size)}
            fixed = [
                r
                for r in result.rows
                if r.case == case and r.size is None and r.kept <= size + 5e-3
            ]
            rounded = min(fixed, key=lambda r: r.increase, default=None)
            best = result.best(case, size)
            cells = [f"{by[m].increase:.4f}" if m in by else "–" for m in methods]
            cells.append("–" if rounded is None else f"{rounded.increase:.4f}")
            rows.append([case, f"{size:.2f}", *cells, "–" if best is None else best.method])
    return header, rows


__all__ = ["EVERYTHING", "SIZES", "Frontier", "Row", "bench_frontier", "bytes_in_file", "table"]
