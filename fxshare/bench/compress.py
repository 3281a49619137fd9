"""``fxshare bench compress``: what calibration and factorisation cost.

Calibration is compared with a plain forward pass over the same tokens; factorisation with
``torch.linalg.svd`` in float64 on the same stacked, whitened weights, at equal error.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.base.machine import environment, interleaved, median_seconds
from fxshare.base.progress import stage
from fxshare.bench.demo import CONFIG
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.gram import pooled_gram
from fxshare.capture import capture, quiet
from fxshare.config import load_config
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.factors.factorise import Factors, Whitening, factorise, whiten
from fxshare.planning.rules import make_plan
from fxshare.plans.plan import Plan
from fxshare.sites.match import match
from fxshare.sites.visible import seen
from passes import weight_and_bias

_LOG = logging.getLogger(__name__)

RATE = 0.8


@dataclass(frozen=True)
class Measured:
    """One run of the benchmark. Ratios are medians of interleaved runs on one machine."""

    environment: dict[str, object]
    shape: dict[str, int]
    tokens: int
    forward_seconds: float
    calibrate_seconds: float
    calibrate_over_forward: float
    groups: int
    factorise_seconds: float
    svd_seconds: float
    svd_over_factorise: float
    worst_error_gap: float
    """Largest difference of the two relative weighted errors over all groups."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


@stage("bench compress", _LOG)
def bench_compress(
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    tokens: int = 32768,
    length: int = 512,
    batch: int = 8,
    group_size: int = 2,
    repeats: int = 3,
    vocabulary: int = 50304,
    seed: int = 0,
) -> Measured:
    """Measure on a GPT-2-shaped model with random weights."""
    torch.manual_seed(seed)
    # the vocabulary is GPT-2's, rounded to a multiple of 64: the head is part of the forward pass
    config = GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, block_size=length, vocab_size=vocabulary
    )
    model = GPT(config).eval()
    cfg = load_config([CONFIG, {"group_size": group_size, "compression_rate": RATE}])
    matching = match(model, cfg)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (tokens // length, length), generator=generator)
    batches = list(torch.split(ids, batch))
    shown = seen(capture(model, batches[0], mode="fx"), matching)
    captured = shown.captured

    def forward() -> None:
        with quiet():
            for one in batches:
                model(one)

    def gather() -> None:
        calibrate(captured, batches, shown.sites)

    times = interleaved({"forward": forward, "calibrate": gather}, repeats=repeats)
    statistics = calibrate(captured, batches, shown.sites)
    plan = make_plan(cfg, shown.sites)
    ours = theirs = gap = 0.0
    for weights, gram, rank in _problems(model, plan, statistics.gram):
        a, b, difference = _race(weights, gram, rank)
        ours, theirs, gap = ours + a, theirs + b, max(gap, difference)
    forward_s, calibrate_s = (median_seconds(times[k]) for k in ("forward", "calibrate"))
    return Measured(
        environment=environment(),
        shape={"layers": layers, "width": width, "heads": heads},
        tokens=tokens,
        forward_seconds=forward_s,
        calibrate_seconds=calibrate_s,
        calibrate_over_forward=calibrate_s / forward_s,
        groups=len(plan.groups),
        factorise_seconds=ours,
        svd_seconds=theirs,
        svd_over_factorise=theirs / ours,
        worst_error_gap=gap,
    )


def _problems(model: nn.Module, plan: Plan, gram_of: Any) -> list[tuple[list[Tensor], Tensor, int]]:
    rows = {s.name: (site.name, s) for site in plan.sites for s in site.slices}
    problems = []
    for group in plan.groups:
        members = [rows[name] for name in group.slices]
        weights = [
            weight_and_bias(model.get_submodule(site))[0].detach()[s.start : s.stop]
            for site, s in members
        ]
        gram = pooled_gram([gram_of(site) for site, _ in members])
        problems.append((weights, gram, group.rank))
    return problems


def _race(weights: list[Tensor], gram_II: Tensor, rank: int) -> tuple[float, float, float]:
    """Seconds of :func:`factorise` and of the SVD, and how far their errors are apart."""
    whitening = whiten(gram_II)
    start = time.perf_counter()
    ours = factorise(weights, whitening, rank)
    middle = time.perf_counter()
    theirs = _svd(weights, whitening, rank)
    end = time.perf_counter()
    return middle - start, end - middle, abs(_error(weights, whitening, ours) - theirs)


def _svd(weights: list[Tensor], whitening: Whitening, rank: int) -> float:
    stacked_OI = torch.cat([w.double() for w in weights])
    assert whitening.root_II is not None
    u, s, vh = torch.linalg.svd(stacked_OI @ whitening.root_II, full_matrices=False)
    basis = torch.linalg.solve_triangular(whitening.root_II, vh[:rank], upper=False, left=False)
    _ = (u[:, :rank] * s[:rank], basis)
    return float((s[rank:] ** 2).sum() / (s**2).sum())


def _error(weights: list[Tensor], whitening: Whitening, factors: Factors) -> float:
    assert whitening.root_II is not None
    lost = total = 0.0
    for w, c in zip(weights, factors.coefficients, strict=True):
        whitened = w.double() @ whitening.root_II
        product = c @ (factors.basis_RI @ whitening.root_II)
        lost += float((whitened - product).pow(2).sum())
        total += float(whitened.pow(2).sum())
    return lost / total


def lines(measured: Measured) -> list[str]:
    """The result for a terminal."""
    m = measured
    return [
        f"GPT-2 shape {m.shape}, {m.tokens:,} tokens, {m.groups} groups",
        f"machine: {m.environment}",
        f"forward over the same tokens   {m.forward_seconds:8.2f} s   1.00",
        f"calibrate                      {m.calibrate_seconds:8.2f} s   "
        f"{m.calibrate_over_forward:.2f} of the forward",
        f"torch.linalg.svd, float64      {m.svd_seconds:8.2f} s   1.00",
        f"factorise, all groups          {m.factorise_seconds:8.2f} s   "
        f"{m.svd_over_factorise:.2f} times faster",
        f"largest gap of the relative weighted errors {m.worst_error_gap:.1e}",
    ]
