"""``fxshare bench quality``: held-out loss of planned plans and Basis Sharing, and of both refined.

Every method sees the same calibration tokens and is measured on the same held-out tokens; stored
numbers are counted in the saved folder, not taken from the plan. Refining sees calibration tokens
only.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.bench.perplexity import evaluate
from fxshare.bench.refined import METHODS, Refined, columns, refined
from fxshare.capture import quiet
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import DataError, FxShareWarning
from fxshare.refining.options import RefineOptions
from fxshare.result.module import record_of
from fxshare.store.save import save

_LOG = logging.getLogger(__name__)

SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Case:
    """A model with its configuration's weight types, and its tokens ``(N, T)``."""

    name: str
    model: nn.Module
    weight_types: Mapping[str, Any]
    calibration: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Row:
    """One method at one size. ``kept`` is counted in the saved file; losses are nats per token."""

    case: str
    size: float
    method: str
    kept: float
    increase: float
    predicted: float | None
    trial: str | None
    seconds: float
    refined: Refined | None = None


@dataclass(frozen=True)
class Quality:
    """All rows, and what they were measured on."""

    environment: dict[str, object]
    seed: int
    tokens: dict[str, dict[str, int]]
    dense_loss: dict[str, float]
    rows: tuple[Row, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def ratio(self, case: str, size: float) -> float:
        """Loss increase of the planned plan over Basis Sharing's."""
        found = {r.method: r.increase for r in self.rows if (r.case, r.size) == (case, size)}
        return found["planned"] / found["basis sharing"]


def methods(
    size: float, *, search: str, kinds: Sequence[str] = ("basis",)
) -> dict[str, dict[str, Any]]:
    """The configurations compared, beside the weight types."""
    planner = {"search": search, "kinds": list(kinds)}
    return {
        "basis sharing": {"group_size": 2, "compression_rate": size},
        "whitened SVD": {"group_size": 1, "compression_rate": size},
        "planned": {"budget": {"params_kept": size}, "planner": planner},
    }


@stage("bench quality", _LOG)
def bench_quality(
    cases: Sequence[Case],
    *,
    sizes: Sequence[float] = SIZES,
    batch: int = 8,
    search: str = "quick",
    kinds: Sequence[str] = ("basis",),
    seed: int = 0,
    refine: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Quality:
    """Measure every method on every case at every size. ``refine``: Basis Sharing and planned plans
    are also refined, for so many minutes each. ``kinds`` of candidates compete in planned plans."""
    if refine is not None:
        RefineOptions(minutes=refine)  # a wrong value is told before anything is compiled
    start = time.perf_counter()
    rows: list[Row] = []
    dense: dict[str, float] = {}
    for case in cases:
        batches = list(torch.split(case.calibration, batch))
        dense[case.name] = _loss(case.model, case.held_out)
        say(f"{case.name}: dense {dense[case.name]:.4f} nats per token")
        for size in sizes:
            for method, extra in methods(size, search=search, kinds=kinds).items():
                gm, seconds = _compiled(case, extra, batches, seed)
                row = _row(case, size, method, gm, dense[case.name], seconds)
                say(f"{case.name} {size:.2f} {method}: +{row.increase:.4f}")
                if refine is not None and method in METHODS:
                    after = _refined(case, gm, dense[case.name], refine, seed)
                    row = replace(row, refined=after)
                    say(f"{case.name} {size:.2f} {method}, refined: +{after.increase:.4f}")
                rows.append(row)
    counts = {
        c.name: {"calibration": c.calibration.numel(), "held_out": c.held_out.numel()}
        for c in cases
    }
    seconds = time.perf_counter() - start
    return Quality(environment(), seed, counts, dense, tuple(rows), seconds)


def _compiled(
    case: Case, extra: Mapping[str, Any], batches: Sequence[Tensor], seed: int
) -> tuple[nn.Module, float]:
    """The compiled model, and how long that took."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        gm = compile_model(
            case.model, [dict(case.weight_types), extra], calibration=batches, seed=seed
        )
    return gm, time.perf_counter() - began


def _row(case: Case, size: float, method: str, gm: nn.Module, dense: float, seconds: float) -> Row:
    outlook = record_of(gm).plan.outlook
    return Row(
        case=case.name,
        size=size,
        method=method,
        kept=kept_in_file(case.model, gm),
        increase=_loss(gm, case.held_out) - dense,
        predicted=None if outlook is None else outlook.predicted,
        trial=None if outlook is None else outlook.trial,
        seconds=seconds,
    )


def _refined(case: Case, gm: nn.Module, dense: float, minutes: float, seed: int) -> Refined:
    return refined(
        gm,
        case.model,
        case.calibration,
        lambda result: _loss(result, case.held_out) - dense,
        minutes=minutes,
        seed=seed,
    )


def _loss(model: nn.Module, tokens: Tensor) -> float:
    with quiet():
        return evaluate(model, tokens).nll


def kept_in_file(model: nn.Module, gm: nn.Module) -> float:
    """Stored numbers of the matched linears in the saved folder over their dense weights."""
    plan = record_of(gm).plan
    with tempfile.TemporaryDirectory() as folder:
        save(gm, Path(folder) / "saved")
        stored = 0
        for file in sorted((Path(folder) / "saved").glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    stored += math.prod(opened.get_slice(name).get_shape())
    everything = {id(t): t.numel() for t in (*model.parameters(), *model.buffers())}
    rest = sum(everything.values()) - plan.dense_numbers
    return (stored - rest) / plan.dense_numbers


def embedded_case(*, calibration_bytes: int = 160_000, every: int = 4) -> Case:
    """The embedded model: calibrated on training modules, measured on modules held out from it."""
    from fxshare.bench.demo import CONFIG
    from fxshare.embedded import load_embedded, load_tokenizer
    from fxshare.embedded.corpus import calibration, held_out, load_documents, pack, token_stream

    tokenizer, documents = load_tokenizer(), load_documents()
    text = calibration(documents, n_bytes=calibration_bytes)
    return Case(
        "embedded",
        load_embedded(),
        CONFIG,
        pack(token_stream(text, tokenizer)),
        pack(token_stream(held_out(documents), tokenizer))[::every],
    )


def folder_case(
    name: str, tokens: Path, weight_types: Mapping[str, Any], *, allow_missing: bool = False
) -> Case:
    """A model by name with a token file that has ``calibration`` and ``heldout`` ``(N, T)``."""
    from fxshare.loading.names import load_model

    with safe_open(tokens, framework="pt") as opened:
        missing = sorted({"calibration", "heldout"} - set(opened.keys()))
        if missing:
            raise DataError(
                f"{tokens}: expected tensors 'calibration' and 'heldout', found "
                f"{sorted(opened.keys())}"
            )
        parts = [opened.get_tensor(key).long() for key in ("calibration", "heldout")]
    model = load_model(name, allow_missing=allow_missing).model.eval()
    return Case(Path(name).name, model, weight_types, parts[0], parts[1])


def table(result: Quality) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per case and size."""
    header = ["model", "kept", "Basis Sharing g2", "whitened SVD", "planned", "planned / BS"]
    header += ["predicted", "kept in file", "plan"]
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for row in result.rows:
        found.setdefault((row.case, row.size), {})[row.method] = row
    rows: list[list[str]] = []
    more: list[str] = []
    for (case, size), by in found.items():
        planned = by["planned"]
        after = [one for method in METHODS if (one := by[method].refined) is not None]
        more, cells = columns(after) if after else ([], [])
        rows.append(
            [
                case,
                f"{size:.2f}",
                f"{by['basis sharing'].increase:.4f}",
                f"{by['whitened SVD'].increase:.4f}",
                f"{planned.increase:.4f}",
                f"{result.ratio(case, size):.3f}",
                "–" if planned.predicted is None else f"{planned.predicted:.4f}",
                f"{planned.kept:.4f}",
                planned.trial or "",
                *cells,
            ]
        )
    return header + more, rows
