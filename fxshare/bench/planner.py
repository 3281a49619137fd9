"""``fxshare bench planner``: how long the planner takes against the number of sites.

A Llama-7B-shaped problem (7 weight types a layer, widths 4096 and 11008) of every kind of
candidate, with synthetic power-law spectra, so that only the planner itself is timed: curves and
their solution.
"""

from __future__ import annotations

import io
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxshare.base.files import write_bytes
from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.config import Budget, Planner
from fxshare.errors import ConfigError
from fxshare.factors.units import Order
from fxshare.planning.kinds.basis import make_problem
from fxshare.planning.kinds.kind import FoundPart, Scene
from fxshare.planning.kinds.named import kinds_named, others_of
from fxshare.planning.nodes import nodes_for
from fxshare.planning.options import options_for
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.solver.curve import Floats
from fxshare.planning.solver.problem import Part, Problem
from fxshare.planning.solver.solve import solve
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.storage import Ints, Storage
from fxshare.sites.attention import Attention
from fxshare.sites.mlps import Mlp
from fxshare.sites.scores import Scores
from fxshare.sites.site import Site, SliceSpec

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
WIDTH = 128
"""Of a head."""
ROUNDED = {8: 1e-5, 4: 2e-3}
"""Of what a slice could lose, what rounding it to so many bits does."""


@dataclass(frozen=True, eq=False)
class PowerLaws(StoredSpectra):
    """Spectra that are random power laws, additive over the slices of a group; hidden units and
    widths of heads lose as ranks of what reads them do."""

    spectra: Mapping[str, Floats] = field(default_factory=dict)
    _known: dict[Part, Floats] = field(default_factory=dict, repr=False)

    def tails(self, part: Part) -> Floats:
        """The loss of a group at every rank from 0; kept, since spectra are given."""
        if part not in self._known:
            height = sum(LLAMA[name.rsplit(".", 1)[1]][1] for name in part)
            size = min(height, *(len(self.spectra[name]) for name in part))
            spectrum = np.sum([self.spectra[name][:size] for name in part], axis=0)
            self._known[part] = np.append(np.cumsum(spectrum[::-1])[::-1] / 2, 0.0)
        return self._known[part]

    def order(self, kind: str, names: tuple[str, ...]) -> Order:
        """Units by what they are worth to a kind."""
        units = WIDTH if kind in ("heads", "keys") else LLAMA["down"][0]
        spectrum = self.spectra[names[0]][:units]
        lost = np.append(np.cumsum(spectrum[::-1])[::-1] / 2, 0.0)
        return Order(torch.arange(units), torch.from_numpy(lost))


class RoundingShares(RoundingPrice):
    """Rounding that loses a share of what a slice could lose at all."""

    def dense(self, part: Part, bits: int) -> float:
        """What dense slices lose together."""
        return ROUNDED[bits] * sum(float(self.spectra.tails(frozenset({n}))[0]) for n in part)

    def factors(self, part: Part, storage: Storage, bits: int, ranks: Ints) -> Floats:
        """What the factors of a group lose beside truncation."""
        return np.full(len(ranks), self.dense(part, bits))


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
    chosen: dict[str, int]
    """How many candidates of each kind are in the plan."""


@dataclass(frozen=True)
class PlannerBench:
    """Timings on one machine; ``seconds`` are wall time, which a busy machine lengthens."""

    environment: dict[str, object]
    kinds: tuple[str, ...]
    bits: tuple[int, ...]
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


def synthetic_problem(
    layers: int, *, kinds: Sequence[str] = ("basis",), bits: Sequence[int] = (16,), seed: int = 0
) -> Problem:
    """The problem of a Llama of so many layers; costs are bytes of a bfloat16 model where numbers
    may have few bits."""
    reads, sites = {}, []
    for layer in range(layers):
        for kind, (width, height, read) in LLAMA.items():
            name = f"layers.{layer}.{kind}"
            own = (SliceSpec(name=name, start=0, stop=height),)
            sites.append(
                Site(
                    name=name,
                    calls=(name,),
                    type=kind,
                    layer=layer,
                    in_features=width,
                    out_features=height,
                    bias=False,
                    slices=own,
                )
            )
            reads[name] = (layer, read)
    nodes = nodes_for(sites, reads)
    rng = np.random.default_rng(seed)
    scale = {name: float(np.exp(rng.normal())) for name in nodes}
    decay = {name: float(rng.uniform(0.3, 1.2)) for name in nodes}
    steps = np.arange(1, 11009, dtype=np.float64)
    laws = {
        name: scale[name] * steps[: node.in_features] ** -decay[name]
        for name, node in nodes.items()
    }
    spectra = PowerLaws(Path(), "", laws)
    planner = Planner(
        kinds=tuple(kinds), bits=tuple(bits), may_share=(("q", "k", "v"), ("gate", "up"))
    )
    budget = Budget(params_kept=0.5) if tuple(bits) == (16,) else Budget(bytes_kept=0.5)
    options = options_for(budget, planner, element_size=2)
    rounding = RoundingShares(spectra, nodes)
    problem = make_problem(nodes, spectra, options, rounding=rounding)
    scene = Scene(_parts(sites), nodes, spectra, options, rounding)
    return replace(problem, others=others_of(kinds_named(kinds), scene))


def _parts(sites: Sequence[Site]) -> tuple[FoundPart, ...]:
    """The MLP, the attention, and its queries and keys, of every layer."""
    found: list[FoundPart] = []
    for at in range(0, len(sites), len(LLAMA)):
        q, k, v, o, gate, up, down = sites[at : at + len(LLAMA)]
        found += [Mlp((gate, up), down), Attention(((v, v.slices[0]),), o, WIDTH)]
        found.append(Scores(((q, q.slices[0]),), ((k, k.slices[0]),), WIDTH))
    return tuple(found)


@stage("bench planner", _LOG)
def bench_planner(
    layers: Sequence[int] = (4, 8, 16, 32, 80),
    *,
    kept: float = 0.8,
    kinds: Sequence[str] = ("basis",),
    bits: Sequence[int] = (16,),
) -> PlannerBench:
    """Time planning (curves, and :func:`solve` with strategy ``auto``) at each number of layers.
    ``kept`` is a share of numbers, or with several widths of bits of bytes.

    Raises :class:`ConfigError` for a kind or a width that there is not.
    """
    timings = []
    for count in layers:
        wall, cpu = time.perf_counter(), time.process_time()
        problem = synthetic_problem(count, kinds=kinds, bits=bits)
        dense = sum(node.in_features * node.out_features for node in problem.nodes.values())
        dense *= 1 if tuple(bits) == (16,) else 2
        solution = solve(problem, kept * dense)
        chosen = Counter(choice.candidate.kind for choice in solution.choices)
        timings.append(
            Timing(
                layers=count,
                sites=len(problem.nodes),
                candidates=len(list(problem.seen())) + len(problem.others),
                groups=len(solution.choices),
                seconds=time.perf_counter() - wall,
                cpu_seconds=time.process_time() - cpu,
                kept=solution.cost / dense,
                gap=solution.gap / max(solution.loss, 1e-300),
                chosen=dict(chosen),
            )
        )
    return PlannerBench(environment(), tuple(kinds), tuple(bits), tuple(timings))


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
    header = [
        "layers",
        "sites",
        "candidates",
        "groups",
        "seconds",
        "processor s",
        "kept",
        "gap",
        "chosen",
    ]
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
            ", ".join(f"{kind} {count}" for kind, count in sorted(t.chosen.items())),
        ]
        for t in result.timings
    ]
