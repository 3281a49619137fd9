"""What a plan says about the hidden units of one MLP: how many stay. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from fxshare.base.names import as_group_name
from fxshare.plans.bits import Bits, matrix_bytes
from fxshare.sites.site import Frozen, ModulePath, Site, TypeNames
from passes import KeptUnits


class Words(NamedTuple):
    """How tables and pictures speak of an entry: its storage, what it has fewer of, several of
    them, and the parts of one."""

    storage: str
    what: str
    several: str
    parts: str


class Units(Frozen):
    """The hidden units of one MLP: rows of its producers, columns of its consumer.

    Which of them stay follows from the data when the plan is carried out, as the factors of a group
    do.
    """

    name: Annotated[str, AfterValidator(as_group_name)]
    kind: Annotated[str, AfterValidator(as_group_name)] = "units"
    """What chose them: ``planner.kinds``."""
    type: TypeNames
    """The weight types of all its sites."""
    layers: tuple[int, ...]
    producers: tuple[ModulePath, ...] = Field(min_length=1)
    """The sites that compute the units; one with gate and up in it has several rows for each."""
    alternating: tuple[ModulePath, ...] = ()
    """Those of them whose rows of one unit are neighbours: gate and up in turn, not in two runs."""
    consumer: ModulePath
    """The site that reads them."""
    kept: int = Field(ge=1)
    """How many stay."""
    of: int = Field(ge=1)
    """How many there are."""
    numbers_per_unit: int = Field(ge=1)
    """Weights of one unit in all its sites."""
    bits: Bits | None = None
    """Of each number of its linears; None for those of the model's dtype."""
    loss: float | None = None
    """Predicted increase of the model's loss per token; None where it was not predicted."""

    @property
    def sites(self) -> tuple[str, ...]:
        """All its sites by name."""
        return (*self.producers, self.consumer)

    def slices_among(self, sites: Iterable[Site]) -> tuple[str, ...]:
        """The slices that it takes, by name."""
        return tuple(s.name for site in sites if site.name in self.sites for s in site.slices)

    @property
    def words(self) -> Words:
        """How tables and pictures speak of it."""
        return Words(
            "units", "hidden units", "MLPs with fewer hidden units", "the hidden units of one MLP"
        )

    @property
    def cached(self) -> tuple[int, int]:
        """Numbers that a key-value cache has for one token of it, before and after."""
        return 0, 0

    @property
    def runs_apart(self) -> bool:
        """Whether the model's own code runs with such linears in the place of its own."""
        return True

    def slice_sizes(self, sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
        """The sizes ``(in, out)`` of its slices, as they are after."""
        return {
            s.name: (
                (self.kept, s.out_features)
                if site.name == self.consumer
                else (site.in_features, s.out_features // self.of * self.kept)
            )
            for site in sites
            if site.name in self.sites
            for s in site.slices
        }

    def read_by(self, consumer: Site) -> tuple[str, ...]:
        """The slices of the consumer that make up for what goes."""
        return tuple(s.name for s in consumer.slices)

    @property
    def turns_biases(self) -> bool:
        """Whether the biases of those slices are combined as their rows are; else they take up what
        the mean of the units loses."""
        return False

    def is_within(self, sites: Iterable[Site]) -> bool:
        """Whether all its sites are among some."""
        return set(self.sites) <= {site.name for site in sites}

    @property
    def dense_numbers(self) -> int:
        """Weights before, biases apart."""
        return self.of * self.numbers_per_unit

    @property
    def stored_numbers(self) -> int:
        """Weights after."""
        return self.kept * self.numbers_per_unit

    def stored_bytes(self, sites: Sequence[Site], itemsize: int) -> int:
        """Stored bytes after, scales included, of a model whose numbers have ``itemsize``."""
        known = {site.name: site for site in sites}
        total = matrix_bytes(self.bits, known[self.consumer].out_features, self.kept, itemsize)
        for name in self.producers:
            site = known[name]
            rows = self.parts_of(site) * self.kept
            total += matrix_bytes(self.bits, rows, site.in_features, itemsize)
        return int(total)

    def parts_of(self, site: Site) -> int:
        """How many rows of a producer each unit has."""
        return site.out_features // self.of

    def rows(self, site: str, number: int, kept: tuple[int, ...]) -> KeptUnits:
        """Which of so many rows of a producer stay, where those units do."""
        each = number // self.of if site in self.alternating else 1
        return KeptUnits(self.name, self.of, kept, number // self.of // each, each)

    def fault(self, known: Mapping[str, Site]) -> str | None:
        """What does not fit the sites; None where all does."""
        missing = [name for name in self.sites if name not in known]
        if missing:
            return f"{missing[0]!r} is not a site of the plan"
        if len(set(self.sites)) < len(self.sites):
            return "a site is named twice"
        if self.kept > self.of:
            return f"keeps {self.kept} of {self.of} units"
        consumer = known[self.consumer]
        if consumer.in_features != self.of:
            return f"has {self.of} units, and {self.consumer!r} reads {consumer.in_features}"
        numbers = consumer.out_features
        for name in self.producers:
            site = known[name]
            if site.out_features % self.of:
                return f"{name!r} has {site.out_features} rows, no multiple of {self.of} units"
            numbers += self.parts_of(site) * site.in_features
            if name in self.alternating and len(site.slices) > 1:
                return f"the rows of {name!r} alternate, and it is split"
            cut = [s for s in site.slices if s.start % self.of or s.stop % self.of]
            if cut:
                return f"the slice {cut[0].name!r} has some of the units only"
        others = set(self.alternating) - set(self.producers)
        if others:
            return f"{min(others)!r} alternates and is none of its producers"
        looked_up = [name for name in self.sites if known[name].lookups]
        if looked_up:
            return f"the rows of {looked_up[0]!r} are looked up"
        if numbers != self.numbers_per_unit:
            return f"says {self.numbers_per_unit} numbers per unit, its sites have {numbers}"
        return None


def units_of(
    producers: Sequence[Site],
    consumer: Site,
    *,
    kept: int,
    name: str | None = None,
    alternating: Sequence[str] = (),
    loss: float | None = None,
) -> Units:
    """The entry of an MLP of which so many units stay; ``alternating`` are producers by name."""
    sites = (*producers, consumer)
    layers = tuple(sorted({site.layer for site in sites if site.layer is not None}))
    of = consumer.in_features
    each = sum(site.out_features // of * site.in_features for site in producers)
    types = "+".join(dict.fromkeys(site.type for site in sites))
    where = "_".join(map(str, layers)) if layers else consumer.name
    made = name or f"units_{where}"
    return Units(
        name="".join(c if c.isalnum() or c == "_" else "_" for c in made),
        type=types,
        layers=layers,
        producers=tuple(site.name for site in producers),
        alternating=tuple(alternating),
        consumer=consumer.name,
        kept=kept,
        of=of,
        numbers_per_unit=each + consumer.out_features,
        loss=loss,
    )


__all__ = ["Units", "Words", "units_of"]
