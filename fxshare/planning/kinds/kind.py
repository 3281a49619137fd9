"""What a kind of candidate owes the planner, beside the groups that share a basis.

A kind says what it may take of a model and what that loses at every cost, and carries out what was
chosen. Solver, search, judge, tables and pictures ask the kind and name none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.planning.options import Options, Side, second_unit, unit_cost
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.solver.problem import Node, Other
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.cost import Shape
from fxshare.plans.storage import PLAIN
from fxshare.plans.units import Units
from fxshare.sites.attention import Attention
from fxshare.sites.head_groups import HeadGroups
from fxshare.sites.mlps import Mlp
from fxshare.sites.scores import Scores

BASIS = "basis"
"""The name of the first kind, groups that share a basis."""


FoundPart: TypeAlias = "Mlp | Attention | HeadGroups | Scores"
"""A part of a graph that was found by its structure."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What a kind sees of a model: its parts, what was measured on them, and what is counted."""

    parts: tuple[FoundPart, ...]
    nodes: Mapping[str, Node]
    spectra: Spectra | StoredSpectra
    options: Options
    rounding: RoundingPrice | None = None
    """What few bits lose, where there are some to choose."""

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        """The MLPs of the graph."""
        return tuple(one for one in self.parts if isinstance(one, Mlp))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Its attention calls."""
        return tuple(one for one in self.parts if isinstance(one, Attention))

    @property
    def head_groups(self) -> tuple[HeadGroups, ...]:
        """Those of which whole heads may go."""
        return tuple(one for one in self.parts if isinstance(one, HeadGroups))

    @property
    def scores(self) -> tuple[Scores, ...]:
        """The queries and keys of its attention calls."""
        return tuple(one for one in self.parts if isinstance(one, Scores))

    @property
    def slices(self) -> Mapping[str, SliceStatistics]:
        """The statistics of every slice; none where a plan is made without the model."""
        return {} if isinstance(self.spectra, StoredSpectra) else self.spectra.slices

    def costs(self, shapes: Sequence[Shape], bits: int | None = None) -> int:
        """What dense linears of these shapes cost, in the budget's unit, at so many bits."""
        none = np.array([0])
        return sum(
            int(unit_cost(shape, none, PLAIN, self.options, dense=True, bits=bits)[0])
            for shape in shapes
        )

    def sides(self) -> Side:
        """What they cost in the second unit."""
        alone = [Shape(node.in_features, node.out_features) for node in self.nodes.values()]
        return second_unit(alone, self.options)[0]


class Kind(Protocol):
    """A kind of candidate."""

    @property
    def name(self) -> str:
        """What configurations and plan files call it."""

    def candidates(self, scene: Scene) -> Sequence[Other]:
        """What it may take, each with its curve of loss against cost; none takes a slice of a
        layer that is kept dense."""

    def entry(self, one: Other, meaning: object, loss: float) -> Units:
        """The entry of a plan for an option of one of its candidates."""

    def carry_out(
        self, entry: Units, consumer: Mapping[str, SliceStatistics], spectra: Spectra, *, bias: bool
    ) -> UnitFactors:
        """The tensors of an entry; ``consumer`` are the slices that read the units."""


Ints = NDArray[np.int64]
__all__ = ["BASIS", "FoundPart", "Ints", "Kind", "Scene"]
