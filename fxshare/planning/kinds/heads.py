"""Heads of attention, a kind of candidate: values become narrower, all heads of a layer alike, or
whole heads go."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fxshare.factors.heads import head_factors, widths_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import Order, UnitFactors, metric_of, read_order, write_order
from fxshare.factors.whole_heads import whole_head_factors, whole_heads_order
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.widths import curve_of_widths
from fxshare.planning.solver.curve import Curve
from fxshare.planning.solver.problem import Other
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.cost import Shape
from fxshare.plans.heads import Heads, heads_of
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads, whole_heads_of
from fxshare.sites.attention import Attention
from fxshare.sites.head_groups import HeadGroups


@dataclass(eq=False)
class AttentionHeads:
    """Values and output of an attention together (:mod:`fxshare.factors.heads`), or some of its
    heads in all four weights (:mod:`fxshare.factors.whole_heads`)."""

    name: str = "heads"
    whole: ClassVar[bool] = True
    """Whether whole heads may go as well."""
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
        return [*found, *self._whole(scene)]

    def _whole(self, scene: Scene) -> list[Other]:
        """Those of which whole heads may go; they take queries and keys as well."""
        kept, found = scene.options.keep_dense, []
        for one in scene.head_groups if self.whole and None in scene.options.bits else ():
            slices = frozenset(
                [s.name for _, s in one.owned] + [s.name for s in one.consumer.slices]
            )
            cut = any(tied & slices and not tied <= slices for tied in scene.options.tie)
            if cut or any(site.layer in kept for site in one.sites.values()):
                continue
            curve = self._curve_of_whole(scene, one)
            found.append(Other(f"{one.consumer.name} whole", slices, curve, self.name, one))
        return found

    def entry(self, one: Other, meaning: object, loss: float) -> Units:
        """The entry of a plan for an option of one of the candidates."""
        found = one.of
        assert isinstance(meaning, int)
        if isinstance(found, HeadGroups):
            whole = whole_heads_of(found, kept=meaning, loss=loss)
            return whole.model_copy(update={"kind": self.name})
        assert isinstance(found, Attention)
        made = heads_of(found.values, found.consumer, found.width, kept=meaning, loss=loss)
        return made.model_copy(update={"kind": self.name})

    def carry_out(
        self, entry: Units, consumer: Mapping[str, SliceStatistics], spectra: Spectra, *, bias: bool
    ) -> UnitFactors:
        """What goes into the values, and what makes up for the width or the heads that go."""
        floor = spectra.relative_floor
        if isinstance(entry, WholeHeads):
            order = self._known_whole(spectra, consumer, tuple(consumer), entry.of)
            return whole_head_factors(entry, consumer, order, bias=bias, relative_floor=floor)
        assert isinstance(entry, Heads)
        lost = self._known(spectra, consumer, tuple(consumer), entry.heads, entry.kv_heads)
        return head_factors(entry, consumer, lost, bias=bias, relative_floor=floor)

    def _curve(self, scene: Scene, one: Attention) -> Curve:
        names = tuple(s.name for s in one.consumer.slices)
        slices = scene.slices
        consumer = {name: slices[name] for name in names} if slices else {}
        found = self._known(scene.spectra, consumer, names, one.heads, one.kv_heads)
        lost = found.lost.cpu().numpy()
        return curve_of_widths(scene, one.width, functools.partial(_shapes, one), lost)

    def _curve_of_whole(self, scene: Scene, one: HeadGroups) -> Curve:
        names = tuple(s.name for s in one.consumer.slices)
        slices = scene.slices
        consumer = {name: slices[name] for name in names} if slices else {}
        found = self._known_whole(scene.spectra, consumer, names, one.kv_heads)
        shapes = functools.partial(_shapes_of_whole, one)
        return curve_of_widths(scene, one.kv_heads, shapes, found.lost.cpu().numpy(), multiple=1)

    def _known(
        self,
        spectra: Spectra | StoredSpectra,
        consumer: Mapping[str, SliceStatistics],
        names: tuple[str, ...],
        heads: int,
        kv_heads: int,
    ) -> Order:
        """What every width loses, kept with the spectra."""

        def made() -> Order:
            slices = list(consumer.values())
            return widths_of(slices[0].gram_II, metric_of(slices), heads, kv_heads)

        return self._kept(spectra, self.name, names, made)

    def _known_whole(
        self,
        spectra: Spectra | StoredSpectra,
        consumer: Mapping[str, SliceStatistics],
        names: tuple[str, ...],
        groups: int,
    ) -> Order:
        """What every number of heads loses, kept with the spectra."""

        def made() -> Order:
            slices = list(consumer.values())
            return whole_heads_order(slices[0].gram_II, metric_of(slices), groups)

        return self._kept(spectra, f"{self.name} whole", names, made)

    def _kept(
        self,
        spectra: Spectra | StoredSpectra,
        kind: str,
        names: tuple[str, ...],
        make: Callable[[], Order],
    ) -> Order:
        if isinstance(spectra, StoredSpectra):
            return spectra.order(kind, names)
        orders, key = self._orders.setdefault(spectra, {}), (kind, *names)
        if key not in orders:
            found = read_order(spectra, kind, names)
            if found is None:
                found = make()
                write_order(spectra, kind, names, found)
            orders[key] = found
        return orders[key]


class NarrowerHeads(AttentionHeads):
    """The same, and all heads stay. To compare with: ``planner.kinds:
    [fxshare.planning.kinds.heads:NarrowerHeads]``."""

    whole: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__("narrower_heads")


def _shapes(one: Attention, kept: int) -> list[Shape]:
    """The linears of an attention whose heads keep so much of their width."""
    found = [Shape(site.in_features, s.out_features // one.width * kept) for site, s in one.values]
    return [*found, Shape(one.heads * kept, one.consumer.out_features)]


def _shapes_of_whole(one: HeadGroups, kept: int) -> list[Shape]:
    """The linears of an attention that keeps so many key-value heads."""
    found = []
    for own in (one.queries, one.keys, one.values):
        rows = sum(s.out_features for _, s in own) // one.kv_heads * kept
        found.append(Shape(own[0][0].in_features, rows))
    inputs = one.consumer.in_features // one.kv_heads * kept
    return [*found, Shape(inputs, one.consumer.out_features)]


__all__ = ["AttentionHeads", "NarrowerHeads"]
