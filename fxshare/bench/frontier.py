"""``fxshare bench frontier``: held-out loss against bytes, for rounding, ranks, hidden units, and
all of them together.

The model is cast to bfloat16, and shares are of the bytes that its matched weights have then; bytes
are counted in the saved folder. Sizes are said in hundredths: where dense weights in few bits take
what rounds to one (4 bits with their scales 0.2813), every method may take as much. Losses are
computed in float32: of a language model nats per token above dense, on one corpus or two, of an
encoder how far sentence embeddings turn, one less the mean cosine. Every method sees the same
calibration tokens, and all plans are made on one set of statistics.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxshare.base.machine import environment, interleaved, median_seconds
from fxshare.base.progress import stage
from fxshare.bench.encoder import embeddings
from fxshare.bench.frontier_refined import refined_on
from fxshare.bench.frontier_table import EVERYTHING, HUNDREDTH, Frontier, Row
from fxshare.bench.perplexity import evaluate
from fxshare.bench.quality import Case
from fxshare.bench.refined import ROWS, Refined
from fxshare.capture import quiet
from fxshare.compiling.several import Several
from fxshare.errors import FxShareWarning, PlanError
from fxshare.factors.rounding import nearest
from fxshare.refining.options import RefineOptions
from fxshare.result.module import ShareModule, record_of
from fxshare.rewriting.lowering import lower
from fxshare.sites.tensors import dense_weights, substitute
from fxshare.store.save import save
from fxshare.verifying.evaluated import evaluated
from passes import structure_copy

_LOG = logging.getLogger(__name__)
SIZES = (0.5, 0.4, 0.33, 0.28, 0.25, 0.2, 0.15)
PLANNED: Mapping[str, Mapping[str, Any]] = {
    # first, since how precisely it has to be priced holds for the others too
    EVERYTHING: {"kinds": ["basis", "units", "heads"], "bits": [16, 8, 4]},
    "bases": {"kinds": ["basis"]},
    "bases, 8 bits": {"kinds": ["basis"], "bits": [8]},
    "units": {"kinds": ["units"]},
}


@dataclass(frozen=True)
class Texts:
    """An encoder with its configuration's weight types, and batches of ids with a mask."""

    name: str
    model: nn.Module
    weight_types: Mapping[str, Any]
    calibration: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class _Bench:
    """A case, its model in bfloat16, and what compiles it."""

    case: Case | Texts
    model: nn.Module
    several: Several
    second: Tensor | None
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

    def refined(
        self, found: Sequence[tuple[Row, nn.Module]], minutes: float, seed: int
    ) -> dict[int, Refined | None]:
        """What some plans lose after refining, by the ids of their rows."""
        given = self.case.calibration
        batches = list(torch.split(given, ROWS)) if isinstance(given, Tensor) else given

        def increase(gm: nn.Module) -> float:
            return self.losses(gm)[0] - self.dense[0]

        # the best single method may be the plan of everything
        keys = [(row.increase, _same(gm)) for row, gm in found]
        once: dict[tuple[float, str], Refined | None] = {}
        for key, (_, gm) in zip(keys, found, strict=True):
            if key not in once:
                once[key] = refined_on(
                    gm, self.model, batches, increase, minutes=minutes, seed=seed
                )
        return {id(row): once[key] for key, (row, _) in zip(keys, found, strict=True)}

    def planned(self, size: float, planner: Mapping[str, Any]) -> nn.Module:
        """The plan of a budget."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxShareWarning)
            return self.several.compiled({"bytes_kept": size}, planner)


@stage("bench frontier", _LOG)
def bench_frontier(
    cases: Sequence[Case | Texts],
    *,
    sizes: Sequence[float] = SIZES,
    second: Mapping[str, Tensor] | None = None,
    batch: int = 8,
    methods: Sequence[str] | None = None,
    search: str = "kinds",
    refine: float | None = None,
    speed: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Frontier:
    """Measure every method on every case at every size. ``second`` are tokens of another corpus, by
    the names of cases; ``speed`` also measures tokens a second of language models, which is
    slow. The best single method and everything are also refined at each size, for ``refine``
    minutes each."""
    if refine is not None:
        RefineOptions(minutes=refine)  # a wrong value is told before anything is compiled
    start = time.perf_counter()
    rows: list[Row] = []
    dense: dict[str, float] = {}
    for case in cases:
        bench = _bench_of(case, (second or {}).get(case.name), (batch, search, seed, speed))
        dense[case.name] = bench.dense[0]
        what = "1 - cosine" if isinstance(case, Texts) else "nats per token"
        say(f"{case.name}: dense {bench.dense[0]:.4f} {what}, bfloat16")
        found = []
        for row, gm in _rows(bench, sizes, methods or tuple(PLANNED)):
            what = "" if row.size is None else f" {row.size:.2f}"
            say(f"{case.name}{what} {row.method}: {row.kept:.3f} of the bytes, +{row.increase:.4f}")
            rows.append(row)
            if refine is not None:
                found.append((row, gm))
        if refine is not None:
            so_far = Frontier({}, seed, search, dense, tuple(rows), 0.0)
            chosen = {id(one) for size in sizes for one in so_far.contenders(case.name, size)}
            after = bench.refined([it for it in found if id(it[0]) in chosen], refine, seed)
            rows = [replace(row, refined=after.get(id(row), row.refined)) for row in rows]
    seconds = time.perf_counter() - start
    return Frontier(environment(), seed, search, dense, tuple(rows), seconds)


def _bench_of(case: Case | Texts, second: Tensor | None, how: tuple[int, str, int, bool]) -> _Bench:
    batch, search, seed, speed = how
    model = structure_copy(case.model, clone_parameters=True).bfloat16()
    given = case.calibration
    batches = list(torch.split(given, batch)) if isinstance(given, Tensor) else list(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        several = Several.of(model, case.weight_types, batches, search=search, seed=seed)
    return _Bench(case, model, several, second, speed)


def _rows(
    bench: _Bench, sizes: Sequence[float], methods: Sequence[str]
) -> Iterator[tuple[Row, nn.Module]]:
    fixed = []
    for bits in (8, 4):
        began = time.perf_counter()
        gm = bench.planned(1.0, {"kinds": ["units"], "bits": [bits], "search": "off"})
        kept = bytes_in_file(bench.model, gm)
        fixed.append(max(kept, _planned_share(gm)))
        yield bench.row(f"dense, {bits} bits, feedback", None, gm, kept, began), gm
        began = time.perf_counter()
        plain = _nearest(bench.model, gm, bits)
        yield bench.row(f"dense, {bits} bits, nearest", None, plain, kept, began), plain
    for size in sizes:
        allowed = max([size, *(one for one in fixed if one <= size + HUNDREDTH)])
        for method in methods:
            began = time.perf_counter()
            try:
                gm = bench.planned(allowed, PLANNED[method])
            except PlanError as error:
                _LOG.info("%s %.2f: no plan, %s", method, size, error)
                continue
            kept = bytes_in_file(bench.model, gm)
            yield bench.row(method, size, gm, kept, began), gm


def _planned_share(gm: nn.Module) -> float:
    """What the plan counts for its matched weights over their bytes in bfloat16, and half a byte:
    what takes so much is within a budget of this share."""
    plan = record_of(gm).plan
    assert plan.outlook is not None
    return (plan.outlook.cost + 0.5) / (2 * plan.dense_numbers)


def _same(gm: nn.Module) -> str:
    """What plans have in common that make one model."""
    losses = {key: {"__all__": {"loss"}} for key in ("groups", "units", "rounded")}
    return record_of(gm).plan.model_dump_json(include=set(losses), exclude=losses)


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


__all__ = ["PLANNED", "SIZES", "Texts", "bench_frontier", "bytes_in_file"]
