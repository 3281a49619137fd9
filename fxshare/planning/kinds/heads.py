"""Heads of attention, a kind of candidate: values become narrower, all heads of a layer alike."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxshare.factors.heads import HeadFactors, head_factors, widths_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import Order, metric_of, read_order, write_order
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.widths import curve_of_widths
from fxshare.planning.solver.curve import Curve
from fxshare.planning.solver.problem import Other
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.cost import Shape
from fxshare.plans.heads import Heads, heads_of
from fxshare.plans.units import Units
from fxshare.sites.attention import Attention


@dataclass(eq=False)
class AttentionHeads:
    """Values and output of an attention together: see :mod:`fxshare.factors.heads`.

    A whole head does not go: heads of one attention have one width, and the calls of their engines
    one number of heads. A head that says little costs as much as the others at any width.
    """

    name: str = "heads"
    _orders: weakref.WeakKeyDictionary[Spectra, dict[tuple[str, ...], Order]] = field(
        init=False, repr=False, default_factory=weakref.WeakKeyDictionary
    )

    def candidates(self, scene: Scene) -> Sequence[Other]:
        """One for every attention that keeps no layer dense and cuts no tie; none where all numbers
        are to have few bits."""
        kept = scene.options.keep_dense
        found = []
        # what they leave is in the model's dtype
        for one in scene.attentions if None in scene.options.bits else ():
            sites = {site.name: site for site, _ in one.values} | {one.consumer.name: one.consumer}
            slices = frozenset(
                [s.name for _, s in one.values] + [s.name for s in one.consumer.slices]
            )
            cut = any(tied & slices and not tied <= slices for tied in scene.options.tie)
            if cut or any(site.layer in kept for site in sites.values()) or one.width < 2:
                continue
            found.append(Other(one.consumer.name, slices, self._curve(scene, one), self.name, one))
        return found

    def entry(self, one: Other, meaning: object, loss: float) -> Units:
        """The entry of a plan for an option of one of the candidates."""
        found = one.of
        assert isinstance(found, Attention)
        assert isinstance(meaning, int)
        made = heads_of(found.values, found.consumer, found.width, kept=meaning, loss=loss)
        return made.model_copy(update={"kind": self.name})

    def carry_out(
        self, entry: Units, consumer: Mapping[str, SliceStatistics], spectra: Spectra, *, bias: bool
    ) -> HeadFactors:
        """What goes into the values, and what makes up for the width that goes."""
        assert isinstance(entry, Heads)
        lost = self._known(spectra, consumer, tuple(consumer), entry.heads, entry.kv_heads)
        floor = spectra.relative_floor
        return head_factors(entry, consumer, lost, bias=bias, relative_floor=floor)

    def _curve(self, scene: Scene, one: Attention) -> Curve:
        names = tuple(s.name for s in one.consumer.slices)
        slices = scene.slices
        consumer = {name: slices[name] for name in names} if slices else {}
        found = self._known(scene.spectra, consumer, names, one.heads, one.kv_heads)
        lost = found.lost.cpu().numpy()
        return curve_of_widths(scene, one.width, functools.partial(_shapes, one), lost)

    def _known(
        self,
        spectra: Spectra | StoredSpectra,
        consumer: Mapping[str, SliceStatistics],
        names: tuple[str, ...],
        heads: int,
        kv_heads: int,
    ) -> Order:
        """What every width loses, kept with the spectra."""
        if isinstance(spectra, StoredSpectra):
            return spectra.order(self.name, names)
        orders = self._orders.setdefault(spectra, {})
        if names not in orders:
            found = read_order(spectra, self.name, names)
            if found is None:
                slices = list(consumer.values())
                found = widths_of(slices[0].gram_II, metric_of(slices), heads, kv_heads)
                write_order(spectra, self.name, names, found)
            orders[names] = found
        return orders[names]


def _shapes(one: Attention, kept: int) -> list[Shape]:
    """The linears of an attention whose heads keep so much of their width."""
    found = [Shape(site.in_features, s.out_features // one.width * kept) for site, s in one.values]
    return [*found, Shape(one.heads * kept, one.consumer.out_features)]


__all__ = ["AttentionHeads"]
