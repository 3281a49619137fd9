"""What a plan says about the queries and keys of one attention: how wide they are. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from fxshare.plans.units import Units, Words
from fxshare.sites.scores import Scores
from fxshare.sites.site import ModulePath, Site
from passes.graph.scores import Rotary, together


class Keys(Units):
    """The width of the heads of the queries and keys of one attention: rows of both.

    ``kept`` and ``of`` are widths of one head, the same in all of them; which numbers those are
    follows from the data when the plan is carried out. ``consumer`` is the site of the queries,
    which make up for what goes, and ``producers`` those of the keys.
    """

    kind: str = "keys"
    queries: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the queries."""
    keys: tuple[ModulePath, ...] = Field(min_length=1)
    """The slices that are the keys."""
    heads: int = Field(ge=1)
    """How many heads the queries have."""
    kv_heads: int = Field(ge=1)
    """How many the keys have."""
    rotary: Rotary = "none"
    """Which numbers of a head are turned into one another: i and i + half of the rotated ones, or
    2 i and 2 i + 1; none, and any matrix may stand between queries and keys."""
    rotated: int = Field(default=0, ge=0)
    """How many numbers of a head are turned, the first ones."""

    @property
    def words(self) -> Words:
        """How tables and pictures speak of it."""
        return Words(
            "keys",
            "width of queries and keys",
            "attentions with narrower queries and keys",
            "the queries and keys of one attention",
        )

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of a head that stay or go together."""
        return together(self.rotary, self.rotated, self.of)

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
        """Numbers of keys that a cache has for one token, before and after."""
        return self.kv_heads * self.of, self.kv_heads * self.kept

    def read_by(self, consumer: Site) -> tuple[str, ...]:
        """The slices of the consumer that make up for what goes."""
        return self.queries

    @property
    def turns_biases(self) -> bool:
        """Whether the biases of those slices are combined as their rows are."""
        return True

    def slices_among(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """The slices that it takes, by name."""
        there = {s.name for site in sites if site.name in self.sites for s in site.slices}
        return tuple(name for name in (*self.queries, *self.keys) if name in there)

    def slice_sizes(self, sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
        """The sizes ``(in, out)`` of its slices, as they are after."""
        own = {*self.queries, *self.keys}
        return {
            s.name: (site.in_features, s.out_features // self.of * self.kept)
            for site in sites
            if site.name in self.sites
            for s in site.slices
            if s.name in own
        }

    def fault(self, known: Mapping[str, Site]) -> str | None:
        """What does not fit the sites; None where all does."""
        missing = [name for name in self.sites if name not in known]
        if missing:
            return f"{missing[0]!r} is not a site of the plan"
        own = (*self.queries, *self.keys)
        if len(set(own)) < len(own):
            return "a slice is named twice"
        if self.bits is not None:
            return f"has bits {self.bits}; what narrower keys leave is stored in the model's dtype"
        if self.kept > self.of:
            return f"keeps a width of {self.kept} of {self.of}"
        if self.rotated > self.of or self.rotated % 2:
            return f"turns {self.rotated} numbers of heads of {self.of}"
        sizes = {0}
        for group in self.together:
            sizes |= {size + len(group) for size in sizes}
        if self.kept not in sizes:
            return f"keeps {self.kept} of {self.of}, of which {self.rotated} are turned in pairs"
        looked_up = [name for name in self.sites if known[name].lookups]
        if looked_up:
            return f"the rows of {looked_up[0]!r} are looked up"
        return self._fault_of_slices(known)

    def _fault_of_slices(self, known: Mapping[str, Site]) -> str | None:
        numbers = 0
        for names, count, sites in (
            (self.queries, self.heads, (self.consumer,)),
            (self.keys, self.kv_heads, self.producers),
        ):
            slices = {s.name: (known[x], s) for x in sites for s in known[x].slices}
            rows = 0
            for name in names:
                if name not in slices:
                    return f"{name!r} is not a slice of {list(sites)}"
                site, s = slices[name]
                if s.out_features % self.of:
                    return f"{name!r} has {s.out_features} rows, no multiple of the width {self.of}"
                rows += s.out_features
                numbers += s.out_features // self.of * site.in_features
            if rows != count * self.of:
                return f"has {count} heads of {self.of}, and {list(names)[:4]} have {rows} rows"
        if self.heads % self.kv_heads:
            return f"has {self.kv_heads} keys for {self.heads} queries"
        if numbers != self.numbers_per_unit:
            return f"says {self.numbers_per_unit} numbers per unit, its sites have {numbers}"
        return None


def keys_of(one: Scores, *, kept: int, name: str | None = None, loss: float | None = None) -> Keys:
    """The entry of an attention whose queries and keys keep so much of their width."""
    sites = one.sites.values()
    layers = tuple(sorted({site.layer for site in sites if site.layer is not None}))
    own = (*one.queries, *one.keys)
    where = "_".join(map(str, layers)) if layers else one.consumer.name
    made = name or f"keys_{where}"
    return Keys(
        name="".join(c if c.isalnum() or c == "_" else "_" for c in made),
        type="+".join(dict.fromkeys(site.type for site in sites)),
        layers=layers,
        producers=tuple(dict.fromkeys(site.name for site, _ in one.keys)),
        consumer=one.consumer.name,
        kept=kept,
        of=one.width,
        numbers_per_unit=sum(s.out_features // one.width * site.in_features for site, s in own),
        loss=loss,
        queries=tuple(s.name for _, s in one.queries),
        keys=tuple(s.name for _, s in one.keys),
        heads=one.heads,
        kv_heads=one.kv_heads,
        rotary=one.rotary,
        rotated=one.rotated,
    )


__all__ = ["Keys", "keys_of"]
