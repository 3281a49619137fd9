"""Make the heads of queries and keys narrower, in the linears that compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError, ShapeError
from passes.graph.graph import calls_by_target, linear_at, put_weight
from passes.graph.scores import NotScores, Scores, attention_scores, calls_by_slices, together
from passes.graph.slices import KeptUnits, set_slices, slices
from passes.graph.trimming import trim
from passes.sharing.whole import check_together, check_whole


@dataclass(frozen=True, eq=False)
class NarrowedKeys:
    """The queries and keys of one attention at another width.

    ``kept`` are the numbers of a head that stay, ascending, of ``of``; where the graph turns none,
    they only say how many. ``queries`` and ``keys`` map slices to their new weights ``(heads in it
    * kept, in)``, ``biases`` some of both to a new bias.
    """

    name: str
    kept: tuple[int, ...]
    of: int
    queries: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All new weights by slice."""
        return {**self.queries, **self.keys}


@dataclass(frozen=True, eq=False)
class NarrowKeys(Pass):
    """Narrower queries and keys: smaller linears, a smaller key-value cache, and no product more.

    Before::

        q = self.q(x).view(b, t, 32, 128).transpose(1, 2)   # Linear(4096, 4096)
        k = self.k(x).view(b, t, 8, 128).transpose(1, 2)    # Linear(4096, 1024)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        z = scaled_dot_product_attention(q, k, v)

    After::

        q = self.q(x).view(b, t, 32, 96).transpose(1, 2)    # Linear(4096, 3072), other weights
        k = self.k(x).view(b, t, 8, 96).transpose(1, 2)     # Linear(4096, 768), some of the rows
        q, k = turn(q, cos_some, sin_some), turn(k, cos_some, sin_some)
        z = scaled_dot_product_attention(q, k, v, scale=128**-0.5)

    ``cos_some`` are the numbers of the table that belong to those of a head that stay, the same in
    all heads. The scale of the scores is that of the width before. ``apart`` says that the linears
    stand in a graph side by side, each for itself: the pass then refuses.
    """

    name: ClassVar[str] = "narrow-keys"
    exact: ClassVar[bool] = False

    selections: tuple[NarrowedKeys, ...] = ()
    apart: bool = False

    def requires(self, gm: fx.GraphModule) -> None:
        known = slices(gm)
        seen: set[str] = set()
        for one in self.selections:
            check_together(self.name, one.name, apart=self.apart)
            ascending = sorted(set(one.kept)) == list(one.kept)
            if not (one.kept and ascending and one.kept[0] >= 0 and one.kept[-1] < one.of):
                raise RequiresError(
                    f"{self.name}: {one.name!r} keeps {list(one.kept)[:8]}, expected ascending "
                    f"numbers from 0 to {one.of - 1}"
                )
            check_whole(self.name, one.name, one.weights, known, seen)
            for name, weight in one.weights.items():
                linear = linear_at(gm, known[name].module)
                heads, cut = divmod(linear.out_features, one.of)
                expected = heads * len(one.kept), linear.in_features
                if cut or tuple(weight.shape) != expected:
                    raise ShapeError(
                        f"{self.name}: {name!r} has {linear.out_features} rows of heads of "
                        f"{one.of} and gets a weight {tuple(weight.shape)}; expected {expected}"
                    )
        products = _Products(gm) if self.selections else None
        for one in self.selections:
            assert products is not None
            self._between(gm, one, products)

    def _between(
        self, gm: fx.GraphModule, one: NarrowedKeys, products: _Products
    ) -> Callable[[], None]:
        """What changes everything between the linears and their product."""
        own = tuple(sorted(one.weights))
        made, leaf = products.made, products.leaf
        nodes = products.by_slices.get(own, [])
        if not nodes:
            raise RequiresError(
                f"{self.name}: no product in the graph has the queries {list(one.queries)[:4]} and "
                f"the keys {list(one.keys)[:4]}; leave {one.name!r} out"
            )
        try:
            found = attention_scores(gm, nodes, leaf)
            self._check(one, found)
            outside = [n for n, name in made.items() if name in own and n not in found.leaves]
            if any(node.users for node in outside):
                raise NotScores(f"computes {outside[0].name!r} for something else")
            return trim(gm, found, one.kept)
        except NotScores as fault:
            raise RequiresError(
                f"{self.name}: {next(iter(one.queries))!r} {fault}; leave {one.name!r} out"
            ) from fault

    def _check(self, one: NarrowedKeys, found: Scores) -> None:
        names = [*found.query_slices], [*found.slices]
        if (found.width, *names) != (one.of, list(one.queries), list(one.keys)):
            raise NotScores(
                f"has heads of {one.of}, and keys {list(one.keys)[:4]}; the graph has "
                f"{found.width}, and {names[1][:4]}"
            )
        for group in together(found.rotary, found.rotated, found.width):
            if len({number in one.kept for number in group}) > 1:
                raise NotScores(
                    f"keeps some of the numbers {list(group)}, which are turned together"
                )

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        narrower = [one for one in self.selections if len(one.kept) < one.of]
        products = _Products(gm) if narrower else None  # those of other attentions stay
        for one in narrower:
            assert products is not None
            apply = self._between(gm, one, products)
            for name, weight in one.weights.items():
                put_weight(gm, name, weight, one.biases.get(name))
                units = KeptUnits(one.name, one.of, one.kept, len(weight) // len(one.kept))
                place = replace(slices(gm)[name], stop=len(weight), unit_rows=units)
                set_slices(gm, {name: place})
                count += 1
            apply()
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for one in self.selections:
            for name in one.weights:
                found = linear_at(gm, slices(gm)[name].module).out_features
                if found % len(one.kept):
                    raise EnsuresError(
                        f"{self.name}: {name!r} has {found} rows, expected heads of {len(one.kept)}"
                    )


@dataclass(eq=False)
class _Products:
    """The linears of a graph, and the products of queries and keys that come from them."""

    gm: fx.GraphModule

    @cached_property
    def made(self) -> dict[fx.Node, str]:
        """The slice that each call of a linear computes."""
        calls = calls_by_target(self.gm, lambda module: isinstance(module, nn.Linear))
        return {n: name for name, at in slices(self.gm).items() for n in calls.get(at.module, [])}

    @cached_property
    def by_slices(self) -> dict[tuple[str, ...], list[fx.Node]]:
        """Of each set of slices."""
        return calls_by_slices(self.gm, self.leaf)

    def leaf(self, node: fx.Node) -> dict[str, int] | None:
        """What a node computes."""
        name = self.made.get(node)
        return None if name is None else {name: linear_at(self.gm, name).out_features}


__all__ = ["NarrowKeys", "NarrowedKeys"]
