"""``fxshare bench planner``: how long the planner takes against the number of sites.

A Llama-7B-shaped problem (7 weight types a layer, widths 4096 and 11008) with synthetic power-law
spectra, so that only the planner itself is timed.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxshare.base.files import write_bytes
from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.errors import ConfigError
from fxshare.planning.solver.curve import DENSE, Curve
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.planning.solver.solve import solve
from fxshare.plans.cost import Shape, numbers, ranks
from fxshare.plans.storage import PIVOTED

_LOG = logging.getLogger(__name__)

# weight type → input width, output width, the activation it reads
LLAMA = {
    "q": (4096, 4096, "attention"),
    "k": (4096, 4096, "attention"),
    "v": (4096, 4096, "attention"),
    "o": (4096, 4096, "heads"),
    "gate": (4096, 11008, "mlp"),
    "up": (4096, 11008, "mlp"),
    "down": (11008, 4096, "hidden"),
}


@dataclass(frozen=True)
class Timing:
    """One problem. ``candidates`` were priced; ``gap`` is relative to the predicted loss."""

    layers: int
    sites: int
    candidates: int
    groups: int
    seconds: float
    cpu_seconds: float
    kept: float
    gap: float


@dataclass(frozen=True)
class PlannerBench:
    """Timings on one machine; ``seconds`` are wall time, which a busy machine lengthens."""

    environment: dict[str, object]
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


def synthetic_problem(layers: int, *, seed: int = 0) -> Problem:
    """A problem whose spectra are random power laws, additive over members."""
    nodes = {}
    for layer in range(layers):
        for kind, (width, height, reads) in LLAMA.items():
            name = f"layers.{layer}.{kind}"
            nodes[name] = Node(name, name, kind, "", layer, None, width, height, (layer, reads))
    rng = np.random.default_rng(seed)
    scale = {name: float(np.exp(rng.normal())) for name in nodes}
    decay = {name: float(rng.uniform(0.3, 1.2)) for name in nodes}
    steps = np.arange(1, 11009, dtype=np.float64)
    spectra = {
        name: scale[name] * steps[: n.in_features] ** -decay[name] for name, n in nodes.items()
    }

    def curve(part: Part) -> Curve:
        members = [nodes[name] for name in part]
        width = members[0].in_features
        height = sum(node.out_features for node in members)
        shape = Shape(width, height, len({node.input for node in members}))
        spectrum = np.sum([spectra[n.name][: shape.full_rank] for n in members], axis=0)
        tail = np.clip(spectrum.sum() - np.cumsum(spectrum), 0, None) / 2
        rank = ranks(shape)
        cost = numbers(shape, rank, PIVOTED)
        keep = cost < shape.dense_numbers
        return Curve(
            np.append(cost[keep], shape.dense_numbers),
            np.append(tail[rank[keep] - 1], 0.0),
            np.append(rank[keep], DENSE),
        )

    shared = (frozenset({"q", "k", "v"}), frozenset({"gate", "up"}))
    return Problem(nodes, curve, may_share=shared)


@stage("bench planner", _LOG)
def bench_planner(layers: Sequence[int] = (4, 8, 16, 32, 80), *, kept: float = 0.8) -> PlannerBench:
    """Time the solver (:func:`solve`, strategy ``auto``) at each number of layers."""
    timings = []
    for count in layers:
        problem = synthetic_problem(count)
        dense = sum(node.in_features * node.out_features for node in problem.nodes.values())
        wall, cpu = time.perf_counter(), time.process_time()
        solution = solve(problem, kept * dense)
        timings.append(
            Timing(
                layers=count,
                sites=len(problem.nodes),
                candidates=len(list(problem.seen())),
                groups=len(solution.choices),
                seconds=time.perf_counter() - wall,
                cpu_seconds=time.process_time() - cpu,
                kept=solution.cost / dense,
                gap=solution.gap / max(solution.loss, 1e-300),
            )
        )
    return PlannerBench(environment(), tuple(timings))


def draw(result: PlannerBench, path: Path) -> None:
    """Plot seconds against sites, both logarithmic; needs the ``viz`` extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'fxshare[viz]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    sites = [t.sites for t in result.timings]
    axes.loglog(sites, [t.seconds for t in result.timings], marker="o", label="wall")
    axes.loglog(sites, [t.cpu_seconds for t in result.timings], marker="s", label="processor")
    axes.set_xlabel("sites (7 per layer)")
    axes.set_ylabel("seconds to plan")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or None)
    write_bytes(path, content.getvalue())


def table(result: PlannerBench) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["layers", "sites", "candidates", "groups", "seconds", "processor s", "kept", "gap"]
    return header, [
        [
            str(t.layers),
            str(t.sites),
            f"{t.candidates:,}",
            str(t.groups),
            f"{t.seconds:.2f}",
            f"{t.cpu_seconds:.2f}",
            f"{t.kept:.4f}",
            f"{t.gap:.2%}",
        ]
        for t in result.timings
    ]
