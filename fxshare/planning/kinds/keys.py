"""Queries and keys of attention, a kind of candidate: they become narrower, all heads of a layer
alike."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fxshare.calibration.gradients import is_projected
from fxshare.factors.keys import (
    Groups,
    KeyFactors,
    QueryMoments,
    key_factors,
    key_order,
    moments_of,
)
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import Order, read_order, write_order
from fxshare.planning.kinds.kind import Scene
from fxshare.planning.kinds.widths import curve_of_widths
from fxshare.planning.solver.curve import Curve
from fxshare.planning.solver.problem import Other
from fxshare.planning.stored_problem import StoredSpectra
from fxshare.plans.cost import Shape
from fxshare.plans.keys import Keys, keys_of
from fxshare.plans.units import Units
from fxshare.sites.scores import Scores


@dataclass(eq=False)
class AttentionKeys:
    """Queries and keys of an attention together: see :mod:`fxshare.factors.keys`."""

    name: str = "keys"
    by_keys: ClassVar[bool] = False
    """Whether they are chosen by the moment of the keys, and not by the loss."""
    _orders: weakref.WeakKeyDictionary[Spectra, dict[tuple[str, ...], Order]] = field(
        init=False, repr=False, default_factory=weakref.WeakKeyDictionary
    )

    def candidates(self, scene: Scene) -> Sequence[Other]:
        """One for every attention that keeps no layer dense and cuts no tie; none where all numbers
        are to have few bits, and none whose queries are so many that the moment of their gradients
        was not kept itself."""
        kept = scene.options.keep_dense
        found = []
        # what they leave is in the model's dtype
        for one in scene.scores if None in scene.options.bits else ():
            slices = frozenset(one.slices)
            cut = any(tied & slices and not tied <= slices for tied in scene.options.tie)
            if cut or any(site.layer in kept for site in one.sites.values()) or one.width < 2:
                continue
            if any(is_projected(site, s) for site, s in one.queries):
                continue
            found.append(Other(one.consumer.name, slices, self._curve(scene, one), self.name, one))
        return found

    def entry(self, one: Other, meaning: object, loss: float) -> Units:
        """The entry of a plan for an option of one of the candidates."""
        found = one.of
        assert isinstance(found, Scores)
        assert isinstance(meaning, int)
        made = keys_of(found, kept=meaning, loss=loss)
        return made.model_copy(update={"kind": self.name})

    def carry_out(
        self, entry: Units, consumer: Mapping[str, SliceStatistics], spectra: Spectra, *, bias: bool
    ) -> KeyFactors:
        """What goes into keys and queries."""
        assert isinstance(entry, Keys)
        queries = {name: consumer[name] for name in entry.queries}
        keys = [spectra.slices[name] for name in entry.keys if self.by_keys]
        moments = moments_of(list(queries.values()), keys, entry.of)
        groups = None if entry.rotary == "none" else entry.together
        heads = entry.heads, entry.kv_heads
        order = self._known(spectra, entry.queries, lambda: (moments, *heads, groups))
        floor = spectra.relative_floor
        return key_factors(
            entry, queries, moments, order, by_keys=self.by_keys, relative_floor=floor
        )

    def _curve(self, scene: Scene, one: Scores) -> Curve:
        entry = keys_of(one, kept=one.width)

        def made() -> tuple[QueryMoments, int, int, Groups | None]:
            queries = [scene.slices[name] for name in entry.queries]
            keys = [scene.slices[name] for name in entry.keys if self.by_keys]
            moments = moments_of(queries, keys, one.width)
            groups = None if one.rotary == "none" else entry.together
            return moments, one.heads, one.kv_heads, groups

        lost = self._known(scene.spectra, entry.queries, made).lost.cpu().numpy()
        return curve_of_widths(scene, one.width, functools.partial(_shapes, one), lost)

    def _known(
        self,
        spectra: Spectra | StoredSpectra,
        names: tuple[str, ...],
        made: Callable[[], tuple[QueryMoments, int, int, Groups | None]],
    ) -> Order:
        """What every width loses, kept with the spectra."""
        if isinstance(spectra, StoredSpectra):
            return spectra.order(self.name, names)
        orders = self._orders.setdefault(spectra, {})
        if names not in orders:
            found = read_order(spectra, self.name, names)
            if found is None:
                moments, heads, kv_heads, groups = made()
                found = key_order(moments, heads, kv_heads, groups, by_keys=self.by_keys)
                write_order(spectra, self.name, names, found)
            orders[names] = found
        return orders[names]


class KeysByKeys(AttentionKeys):
    """The same, chosen by what queries and keys are, whatever the loss makes of them; queries that
    stay are left as they are. To compare with: ``planner.kinds:
    [fxshare.planning.kinds.keys:KeysByKeys]``."""

    by_keys: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__("keys_by_keys")


def _shapes(one: Scores, kept: int) -> list[Shape]:
    """The linears of an attention whose queries and keys keep so much of their width."""
    return [
        Shape(site.in_features, s.out_features // one.width * kept)
        for site, s in (*one.queries, *one.keys)
    ]


__all__ = ["AttentionKeys", "KeysByKeys"]
