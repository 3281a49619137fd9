"""``fxshare bench encoder``: how far compressed sentence embeddings turn from the dense model's.

An embedding is the mean of a text's token vectors, as sentence-transformers pools them; the cosine
with the dense model's embedding of the same text is what retrieval sees.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.base.machine import environment
from fxshare.base.numerics import float_leaves
from fxshare.base.progress import stage
from fxshare.bench.quality import methods
from fxshare.bench.refined import METHODS
from fxshare.calibration.distance import output_rows
from fxshare.capture.call import MASK
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import DataError, FxShareWarning
from fxshare.refining.refine import refine as refine_model
from fxshare.result.module import record_of

_LOG = logging.getLogger(__name__)
_POOLED = 0.5
"""What is compared are means over tokens, which therefore count half where plans are refined."""
_RATE = 1e-3
"""Of 1e-3 and 3e-3 the one with which all-MiniLM-L6-v2 came nearer in 240 steps of Muon; a range
test would take a tenth of the time."""


@dataclass(frozen=True)
class Refining:
    """How long plans are refined, on what."""

    minutes: float
    batches: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]] | None = None
    """What says which state is the best; a tenth of ``batches`` where None."""


@dataclass(frozen=True)
class RefinedCosine:
    """A plan after refining, at as many stored numbers as before: cosines on the held-out texts;
    ``tokens`` were trained on, in ``seconds`` of wall time."""

    cosine: float
    lowest: float
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class EncoderRow:
    """One method at one size: cosines with the dense embeddings over the held-out texts."""

    size: float
    method: str
    cosine: float
    lowest: float
    params_kept: float
    seconds: float
    """Processor seconds of the compile."""
    refined: RefinedCosine | None = None


@dataclass(frozen=True)
class Encoder:
    """All rows, and what they were measured on."""

    environment: dict[str, object]
    seed: int
    tokens: int
    texts: int
    rows: tuple[EncoderRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


def embeddings(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Unit vectors ``(N, D)``: per text the mean of its token vectors that are not masked.

    Raises :class:`DataError` where the model's first output is no ``(B, T, D)``.
    """
    found = []
    with torch.no_grad():
        for batch in batches:
            output = model(**batch)
            mask = batch[MASK]
            _, leaf = next(iter(float_leaves(output)), ("", torch.zeros(0)))
            if leaf.ndim != 3 or leaf.shape[:2] != mask.shape:
                raise DataError(
                    f"bench encoder: expected token vectors (batch, tokens, width) as the first "
                    f"output of {type(model).__name__}, found {tuple(leaf.shape)}"
                )
            rows = next(output_rows(leaf, dict(batch)))
            texts = torch.split(rows, [int(n) for n in mask.sum(1)])
            found += [nn.functional.normalize(text.mean(0), dim=0) for text in texts]
    return torch.stack(found)


@stage("bench encoder", _LOG)
def bench_encoder(
    model: nn.Module,
    weight_types: Mapping[str, Any],
    calibration: Sequence[Mapping[str, Tensor]],
    held_out: Sequence[Mapping[str, Tensor]],
    *,
    sizes: Sequence[float] = (0.7, 0.5),
    search: str = "quick",
    kinds: Sequence[str] = ("basis",),
    refine: Refining | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Encoder:
    """Measure Basis Sharing, whitened SVD and planned plans; batches have ids and a mask.
    ``refine``: Basis Sharing and planned plans are also refined."""
    dense = embeddings(model, held_out)
    rows = []
    for size in sizes:
        for method, extra in methods(size, search=search, kinds=kinds).items():
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FxShareWarning)
                sources: list[Any] = [dict(weight_types), extra]
                gm = compile_model(model, sources, calibration=calibration, seed=seed)
            seconds = time.process_time() - began
            kept = record_of(gm).report.params_kept
            mean, lowest = _cosines(gm, held_out, dense)
            row = EncoderRow(size, method, mean, lowest, kept, seconds)
            say(f"{size:.2f} {method}: cosine {mean:.4f}, in {seconds:.0f} processor seconds")
            if refine is not None and method in METHODS and size < 1:
                after = _refined(gm, model, refine, held_out, dense, seed)
                row = replace(row, refined=after)
                say(f"{size:.2f} {method}, refined: cosine {after.cosine:.4f}")
            rows.append(row)
    tokens = sum(int(batch[MASK].sum()) for batch in calibration)
    return Encoder(environment(), seed, tokens, len(dense), tuple(rows))


def _cosines(
    gm: nn.Module, held_out: Sequence[Mapping[str, Tensor]], dense: Tensor
) -> tuple[float, float]:
    """Mean and lowest over the texts."""
    found = (embeddings(gm, held_out) * dense).sum(-1)
    return float(found.mean()), float(found.min())


def _refined(
    gm: nn.Module,
    model: nn.Module,
    refining: Refining,
    held_out: Sequence[Mapping[str, Tensor]],
    dense: Tensor,
    seed: int,
) -> RefinedCosine:
    result = refine_model(
        gm,
        model,
        refining.batches,
        minutes=refining.minutes,
        heldout=refining.held_out,
        objective="hidden",
        pool_weight=_POOLED,
        also=("norms", "biases"),
        optimiser="muon",
        learning_rate=_RATE,
        seed=seed,
    )
    done = record_of(result).refined[-1]
    cosines = _cosines(result, held_out, dense)
    return RefinedCosine(*cosines, done.steps, done.tokens, done.seconds)


__all__ = ["Encoder", "EncoderRow", "RefinedCosine", "Refining", "bench_encoder", "embeddings"]
