"""Hidden units, a kind of candidate: an MLP keeps the best of them in all its linears."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import (
    Order,
    UnitFactors,
    metric_of,
    order_of,
    read_order,
    unit_factors,
    write_order,
)
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.solver.curve import DENSE, Curve, allowed
from fxshare.planning.solver.problem import Other
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.cost import Shape, ranks
from fxshare.plans.units import Units, units_of
from fxshare.sites.mlps import Mlp


@dataclass(eq=False)
class HiddenUnits:
    """Which units stay is chosen by :func:`fxshare.factors.units.order_of`; a kind of one's own
    may derive from this one and put them in another :meth:`order`."""

    name: str = "units"
    _orders: weakref.WeakKeyDictionary[Spectra, dict[tuple[str, ...], Order]] = field(
        init=False, repr=False, default_factory=weakref.WeakKeyDictionary
    )

    def order(self, consumer: Mapping[str, SliceStatistics]) -> Order:
        """The units by what they are worth, and what every number of them loses; ``consumer`` are
        the slices that read them."""
        first = next(iter(consumer.values()))
        return order_of(first.gram_II, metric_of(list(consumer.values())))

    def candidates(self, scene: Scene) -> Sequence[Other]:
        """One for every MLP that keeps no layer dense and cuts no tie."""
        kept = scene.options.keep_dense
        found = []
        for mlp in scene.mlps:
            sites = (*mlp.producers, mlp.consumer)
            slices = frozenset(s.name for site in sites for s in site.slices)
            cut = any(tied & slices and not tied <= slices for tied in scene.options.tie)
            if cut or any(site.layer in kept for site in sites) or mlp.units < 2:
                continue
            found.append(Other(mlp.consumer.name, slices, self._curve(scene, mlp), self.name, mlp))
        return found

    def entry(self, one: Other, meaning: object, loss: float) -> Units:
        """The entry of a plan for an option of one of the candidates."""
        mlp = one.of
        assert isinstance(mlp, Mlp)
        kept, bits = meaning if isinstance(meaning, tuple) else (meaning, None)
        assert isinstance(kept, int)
        made = units_of(
            mlp.producers, mlp.consumer, kept=kept, alternating=mlp.alternating, loss=loss
        )
        return made.model_copy(update={"kind": self.name, "bits": bits})

    def carry_out(
        self, entry: Units, consumer: Mapping[str, SliceStatistics], spectra: Spectra, *, bias: bool
    ) -> UnitFactors:
        """The units that stay, and what makes up for the others."""
        order = self._known(spectra, tuple(consumer), consumer)
        floor = spectra.relative_floor
        return unit_factors(entry, dict(consumer), order, bias=bias, relative_floor=floor)

    def _curve(self, scene: Scene, mlp: Mlp) -> Curve:
        names = tuple(s.name for s in mlp.consumer.slices)
        slices = scene.slices
        consumer = {name: slices[name] for name in names} if slices else {}
        lost = self._known(scene.spectra, names, consumer).lost.cpu().numpy()
        counts = ranks(Shape(mlp.units, mlp.units), scene.options.rank_multiple)
        counts = np.append(counts[counts < mlp.units], mlp.units)
        side = scene.sides()
        none = np.array([0])
        beside = np.array(
            [sum(int(side(one, none, None)[0]) for one in _shapes(mlp, int(n))) for n in counts]
        )
        options, size = scene.options, mlp.units + 1
        costs, labels, losses = [], [], []
        meanings: list[object] = []
        for number, bits in enumerate(options.bits):
            costs.append([scene.costs(_shapes(mlp, int(count)), bits) for count in counts])
            label = counts + number * size
            if bits is None:
                label[-1] = DENSE
            labels.append(label)
            losses.append(lost[counts] + self._rounding(scene, mlp, bits))
            meanings += [kept if bits is None else (kept, bits) for kept in range(size)]
        cost, label = np.concatenate(costs), np.concatenate(labels)
        dense = float(scene.costs(_shapes(mlp, mlp.units)))
        most = None if options.ceiling >= 1.0 else options.ceiling * dense
        taken = allowed(cost, label, least=options.floor * dense, most=most)
        return Curve(
            cost[taken],
            np.maximum(np.concatenate(losses)[taken], 0.0),
            label[taken],
            np.tile(beside, len(options.bits))[taken],
            meanings,
        )

    def _rounding(self, scene: Scene, mlp: Mlp, bits: int | None) -> float:
        """What rounding loses: that of all units, of which the best stay."""
        if bits is None:
            return 0.0
        assert scene.rounding is not None
        sites = (*mlp.producers, mlp.consumer)
        return scene.rounding.dense(frozenset(s.name for x in sites for s in x.slices), bits)

    def _known(
        self,
        spectra: Spectra | StoredSpectra,
        names: tuple[str, ...],
        consumer: Mapping[str, SliceStatistics],
    ) -> Order:
        if isinstance(spectra, StoredSpectra):
            return spectra.order(self.name, names)
        orders = self._orders.setdefault(spectra, {})
        if names not in orders:
            found = read_order(spectra, self.name, names)
            if found is None:
                found = self.order(consumer)
                write_order(spectra, self.name, names, found)
            orders[names] = found
        return orders[names]


def _shapes(mlp: Mlp, kept: int) -> list[Shape]:
    """The linears of an MLP that keeps so many units."""
    found = [
        Shape(site.in_features, site.out_features // mlp.units * kept) for site in mlp.producers
    ]
    return [*found, Shape(kept, mlp.consumer.out_features)]


__all__ = ["HiddenUnits"]
