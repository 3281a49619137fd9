"""A plan of the search: what was chosen, what it was predicted to lose, and what it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxshare.factors.codes import CodedSlices
from fxshare.factors.factored import Factored
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.rounding import lost_by
from fxshare.factors.spectra import Spectra
from fxshare.planning.judge import Lost
from fxshare.planning.made import CarriedOut
from fxshare.planning.solver.solve import Solution
from fxshare.planning.trials import Trial, Tried
from fxshare.plans.bits import Rounded, bits_of_slices
from fxshare.plans.plan import Group


@dataclass(eq=False)
class Planned:
    """A plan that was tried: its groups, its factors, and what it was predicted to lose."""

    solution: Solution
    groups: tuple[Group, ...]
    factors: Factored
    trial: Trial
    refitted: bool
    units: CarriedOut | None = None  # what other kinds took
    rounded: tuple[Rounded, ...] = ()
    """Dense slices in few bits."""
    seconds: float = 0.0
    predicted: float = math.nan
    """In the model's loss, whatever the ranks were chosen by."""
    bound: float = 0.0
    priced_bound: float = 0.0
    spectra: Spectra | None = None
    lost: Lost = field(default_factory=lambda: Lost(math.nan, 0))
    """On held-back data."""

    @property
    def measured(self) -> float:
        """The loss increase per token."""
        return self.lost.per_token

    @property
    def what(self) -> object:
        """What tells its weights apart; None where the statistics have no name."""
        what, units, coded = self.factors.what, self.units, self.coded
        if what is None or not (units or coded):
            return what
        return what, units and units.what, coded and coded.what

    @property
    def coded(self) -> CodedSlices | None:
        """The codes of dense slices; in the arithmetic and on the statistics of the factors."""
        if not self.rounded:
            return None
        factors = self.factors
        bits = bits_of_slices(self.rounded)
        return CodedSlices(bits, factors.spectra, factors.bias, factors.dtype)

    def take(self, twin: Planned) -> None:
        """Take over what was found of an equal plan."""
        self.refitted, self.groups, self.units = twin.refitted, twin.groups, twin.units
        self.rounded = twin.rounded
        self.lost, self.predicted = twin.lost, twin.predicted


def better_half(plans: Sequence[Planned]) -> list[Planned]:
    """Of plans that were tried those that are measured on everything, the first of equal ones."""
    ranked = sorted(plans, key=lambda one: one.measured)
    return ranked[: -(-len(ranked) // 2)]


def outcome(one: Planned, label: str) -> Tried:
    """The outcome of a trial that was measured."""
    return Tried(
        trial=one.trial.name + label,
        predicted=one.predicted,
        measured=one.measured,
        tokens=one.lost.tokens,
        cost=one.solution.cost,
        groups=len(one.groups) + len(one.units or ()),
        seconds=one.seconds,
    )


def said(one: Planned) -> str:
    """Its losses in words."""
    text = f"predicted loss {one.predicted:+.4g}"
    if not math.isnan(one.measured):
        text += f", measured {one.measured:+.4g} on {one.lost.tokens:,} tokens"
    return text


def inputs_of(group: Group, spectra: Spectra) -> int:
    """How many distinct inputs the slices of a group have."""
    return len({spectra.slices[name].input for name in group.slices})


def price(one: Planned, slices: Mapping[str, SliceStatistics]) -> None:
    """Give a plan its predicted loss; where the ranks were chosen by activation error, the groups'
    losses are measured in the loss-aware metric, on the factors themselves."""
    if one.trial.loss_aware:
        one.predicted = one.solution.loss
        return
    groups = []
    for group in one.groups:
        factors = one.factors[group.name]
        products = ((name, factors.product(name, factors.basis_RI.dtype)) for name in group.slices)
        lost = sum(slices[name].quadratic_loss(product) for name, product in products)
        groups.append(group.model_copy(update={"loss": lost}))
    one.groups = tuple(groups)
    one.predicted = sum(group.loss or 0.0 for group in groups)
    for name, codes in (one.coded or {}).items():
        one.predicted += lost_by(slices[name], codes.values(torch.float64))
    for made in (one.units or {}).values():
        wholes = ((name, made.whole(name, torch.float64)) for name in made.weights)
        one.predicted += sum(slices[name].quadratic_loss(whole) for name, whole in wholes)


def signature(one: Planned) -> object:
    """What tells a plan apart from others of one search."""
    groups = frozenset((g.slices, g.rank, g.storage, g.bits) for g in one.groups)
    coded = one.coded
    return one.trial.loss_aware, groups, repr((one.units and one.units.what, coded and coded.what))


__all__ = ["Planned", "better_half", "inputs_of", "outcome", "price", "said", "signature"]
