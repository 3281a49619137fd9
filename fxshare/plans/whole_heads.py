"""What a plan says about the heads of one attention: how many stay. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from fxshare.plans.units import Units, Words
from fxshare.sites.head_groups import HeadGroups
from fxshare.sites.site import ModulePath, Site
from passes import KeptUnits
from passes.graph.whole_heads import spans


class WholeHeads(Units):
    """The heads of one attention: rows of queries, keys and values, columns of what reads them.

    ``kept`` and ``of`` count the heads of keys and values; those of the queries go with them. Which
    stay follows from the data when the plan is carried out. ``producers`` are the sites that
    compute queries, keys and values, whole or in part.
    """

    kind: str = "heads"
    queries: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the queries."""
    keys: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the keys."""
    values: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the values."""
    heads: int = Field(ge=1)
    """How many heads the queries have."""
    width: int = Field(ge=1)
    """Of one key and one value together."""

    @property
    def words(self) -> Words:
        """How tables and pictures speak of it."""
        what = "heads" if self.heads == self.of else "key-value heads"
        parts = f"the {what} of one attention"
        return Words("whole heads", what, "attentions with fewer heads", parts)

    @property
    def own(self) -> tuple[str, ...]:
        """The slices of queries, keys and values."""
        return *self.queries, *self.keys, *self.values

    def units_of(self, rows: Mapping[str, int], kept: tuple[int, ...]) -> dict[str, KeptUnits]:
        """Which heads each slice of queries, keys and values has, with the rows that it has, and
        which are there of those that stay."""
        found = {}
        for names in (self.queries, self.keys, self.values):
            for name, span in spans({name: rows[name] for name in names}, self.of).items():
                each = rows[name] // (span[1] - span[0])
                found[name] = KeptUnits(self.name, self.of, kept, each=each, span=span)
        return found

    def stored_bytes(self, sites: Sequence[Site], itemsize: int) -> int:
        """Stored bytes after."""
        return self.stored_numbers * itemsize

    @property
    def runs_apart(self) -> bool:
        """Whether the model's own code runs with such linears in the place of its own: it names the
        number of heads."""
        return False

    @property
    def cached(self) -> tuple[int, int]:
        """Numbers of keys and values that a cache has for one token, before and after."""
        return self.of * self.width, self.kept * self.width

    def slices_among(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """The slices that it takes, by name."""
        sites = list(sites)
        whole = {s.name for site in sites if site.name == self.consumer for s in site.slices}
        there = {s.name for site in sites if site.name in self.producers for s in site.slices}
        return (*(name for name in self.own if name in there), *sorted(whole))

    def slice_sizes(self, sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
        """The sizes ``(in, out)`` of its slices, as they are after; of queries, keys and values of
        several slices as if the first ones stayed."""
        there = {s.name: (x, s) for x in sites if x.name in self.sites for s in x.slices}
        found = {
            name: (site.in_features // self.of * self.kept, s.out_features)
            for name, (site, s) in there.items()
            if site.name == self.consumer
        }
        rows = {name: there[name][1].out_features for name in self.own}
        for name, units in self.units_of(rows, tuple(range(self.kept))).items():
            found[name] = there[name][0].in_features, units.size
        return found

    def fault(self, known: Mapping[str, Site]) -> str | None:
        """What does not fit the sites; None where all does."""
        missing = [name for name in self.sites if name not in known]
        if missing:
            return f"{missing[0]!r} is not a site of the plan"
        if len(set(self.sites)) < len(self.sites) or len(set(self.own)) < len(self.own):
            return "a site or slice is named twice"
        if self.bits is not None:
            return f"has bits {self.bits}; what fewer heads leave is stored in the model's dtype"
        if self.kept > self.of:
            return f"keeps {self.kept} of {self.of} heads"
        if self.heads % self.of:
            return f"has {self.of} keys and values for {self.heads} queries"
        looked_up = [name for name in self.sites if known[name].lookups]
        if looked_up:
            return f"the rows of {looked_up[0]!r} are looked up"
        consumer = known[self.consumer]
        if consumer.in_features % self.heads:
            return f"has {self.heads} heads, and {self.consumer!r} reads {consumer.in_features}"
        numbers = consumer.in_features // self.of * consumer.out_features
        slices = {s.name: (known[x], s) for x in self.producers for s in known[x].slices}
        for names in (self.queries, self.keys, self.values):
            count, rows = self.heads if names is self.queries else self.of, 0
            for name in names:
                if name not in slices:
                    return f"{name!r} is not a slice of {list(self.producers)}"
                site, s = slices[name]
                rows += s.out_features
                numbers += s.out_features * site.in_features // self.of
            each, cut = divmod(rows, count)
            parted = [n for n in names if not each or slices[n][1].out_features % each]
            if cut or parted:
                first = (*parted, *names)[0]
                return f"{first!r} has no whole heads, with {count} of them in {rows} rows"
        cached = sum(slices[name][1].out_features for name in (*self.keys, *self.values))
        if cached != self.of * self.width:
            return f"has {self.of} keys and values of {self.width}, of {cached} rows"
        if numbers != self.numbers_per_unit:
            return f"says {self.numbers_per_unit} numbers per unit, its sites have {numbers}"
        return None


def whole_heads_of(
    one: HeadGroups, *, kept: int, name: str | None = None, loss: float | None = None
) -> WholeHeads:
    """The entry of an attention of which so many key-value heads stay."""
    sites, consumer = one.sites.values(), one.consumer
    layers = tuple(sorted({site.layer for site in sites if site.layer is not None}))
    where = "_".join(map(str, layers)) if layers else consumer.name
    made = name or f"whole_heads_{where}"
    each = sum(s.out_features * site.in_features for site, s in one.owned) // one.kv_heads
    queries, keys, values = one.slices
    return WholeHeads(
        name="".join(c if c.isalnum() or c == "_" else "_" for c in made),
        type="+".join(dict.fromkeys(site.type for site in sites)),
        layers=layers,
        producers=tuple(name for name in one.sites if name != consumer.name),
        consumer=consumer.name,
        kept=kept,
        of=one.kv_heads,
        numbers_per_unit=each + consumer.in_features // one.kv_heads * consumer.out_features,
        loss=loss,
        queries=queries,
        keys=keys,
        values=values,
        heads=one.heads,
        width=sum(s.out_features for _, s in (*one.keys, *one.values)) // one.kv_heads,
    )


__all__ = ["WholeHeads", "whole_heads_of"]
