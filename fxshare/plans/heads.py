"""What a plan says about the heads of one attention: how wide values are. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from fxshare.plans.units import Units, Words
from fxshare.sites.site import ModulePath, Site, SliceSpec


class Heads(Units):
    """The width of the heads of one attention: rows of the values, columns of what reads them.

    ``kept`` and ``of`` are widths of one head, the same in all of them; which part of the values
    that is follows from the data when the plan is carried out. ``producers`` are the sites that
    compute the values, whole or in part.
    """

    kind: str = "heads"
    values: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the values."""
    heads: int = Field(ge=1)
    """How many heads the consumer reads."""
    kv_heads: int = Field(ge=1)
    """How many the values have."""

    @property
    def words(self) -> Words:
        """How tables and pictures speak of it."""
        return Words(
            "heads",
            "width of heads",
            "attentions with narrower heads",
            "the heads of one attention",
        )

    def stored_bytes(self, sites: Sequence[Site], itemsize: int) -> int:
        """Stored bytes after."""
        return self.stored_numbers * itemsize

    @property
    def runs_apart(self) -> bool:
        """Whether the model's own code runs with such linears in the place of its own: it names the
        width of heads."""
        return False

    @property
    def cached(self) -> tuple[int, int]:
        """Numbers of values that a cache has for one token, before and after."""
        return self.kv_heads * self.of, self.kv_heads * self.kept

    def slices_among(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """The slices that it takes, by name."""
        whole = {s.name for site in sites if site.name == self.consumer for s in site.slices}
        there = {s.name for site in sites if site.name in self.producers for s in site.slices}
        return (*(name for name in self.values if name in there), *sorted(whole))

    def slice_sizes(self, sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
        """The sizes ``(in, out)`` of its slices, as they are after."""
        found = {}
        for site in sites:
            for s in site.slices if site.name in self.sites else ():
                if site.name == self.consumer:
                    found[s.name] = self.heads * self.kept, s.out_features
                elif s.name in self.values:
                    found[s.name] = site.in_features, s.out_features // self.of * self.kept
        return found

    def fault(self, known: Mapping[str, Site]) -> str | None:
        """What does not fit the sites; None where all does."""
        missing = [name for name in self.sites if name not in known]
        if missing:
            return f"{missing[0]!r} is not a site of the plan"
        if len(set(self.sites)) < len(self.sites) or len(set(self.values)) < len(self.values):
            return "a site or slice is named twice"
        if self.bits is not None:
            return f"has bits {self.bits}; what narrower heads leave is stored in the model's dtype"
        if self.kept > self.of:
            return f"keeps a width of {self.kept} of {self.of}"
        consumer = known[self.consumer]
        if consumer.in_features != self.heads * self.of:
            return (
                f"has {self.heads} heads of {self.of}, and {self.consumer!r} reads "
                f"{consumer.in_features}"
            )
        looked_up = [name for name in self.sites if known[name].lookups]
        if looked_up:
            return f"the rows of {looked_up[0]!r} are looked up"
        return self._fault_of_values(known)

    def _fault_of_values(self, known: Mapping[str, Site]) -> str | None:
        slices = {s.name: (known[x], s) for x in self.producers for s in known[x].slices}
        numbers, rows = self.heads * known[self.consumer].out_features, 0
        for name in self.values:
            if name not in slices:
                return f"{name!r} is not a slice of {list(self.producers)}"
            site, s = slices[name]
            if s.out_features % self.of:
                return f"{name!r} has {s.out_features} rows, no multiple of the width {self.of}"
            rows += s.out_features
            numbers += s.out_features // self.of * site.in_features
        if rows != self.kv_heads * self.of or self.heads % self.kv_heads:
            return (
                f"has {self.kv_heads} heads of {self.of} for {self.heads}, and its values have "
                f"{rows} rows"
            )
        if numbers != self.numbers_per_unit:
            return f"says {self.numbers_per_unit} numbers per unit, its sites have {numbers}"
        return None


def heads_of(
    values: Sequence[tuple[Site, SliceSpec]],
    consumer: Site,
    width: int,
    *,
    kept: int,
    name: str | None = None,
    loss: float | None = None,
) -> Heads:
    """The entry of an attention whose heads keep so much of their width."""
    producers = {site.name: site for site, _ in values}
    sites = (*producers.values(), consumer)
    layers = tuple(sorted({site.layer for site in sites if site.layer is not None}))
    heads = consumer.in_features // width
    each = sum(s.out_features // width * site.in_features for site, s in values)
    where = "_".join(map(str, layers)) if layers else consumer.name
    made = name or f"heads_{where}"
    return Heads(
        name="".join(c if c.isalnum() or c == "_" else "_" for c in made),
        type="+".join(dict.fromkeys(site.type for site in sites)),
        layers=layers,
        producers=tuple(producers),
        consumer=consumer.name,
        kept=kept,
        of=width,
        numbers_per_unit=each + heads * consumer.out_features,
        loss=loss,
        values=tuple(s.name for _, s in values),
        heads=heads,
        kv_heads=sum(s.out_features for _, s in values) // width,
    )


__all__ = ["Heads", "heads_of"]
