"""Make the heads of values narrower, in the linears that compute and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError, ShapeError
from passes.graph.graph import calls_by_target, linear_at, put_weight
from passes.graph.heads import Heads, NotHeads, attention_heads
from passes.graph.narrowing import narrow
from passes.graph.slices import KeptUnits, set_slices, slices
from passes.sharing.whole import check_together, check_whole


@dataclass(frozen=True, eq=False)
class NarrowedHeads:
    """The heads of one attention at another width.

    ``kept`` is their width after, ``of`` before. ``values`` maps the slices that compute the values
    to their new weights ``(heads in it * kept, in)``, and ``consumers`` those that read the heads
    to theirs, ``(out, heads * kept)``; ``biases`` some of both to a new bias.
    """

    name: str
    kept: int
    of: int
    values: Mapping[str, Tensor]
    consumers: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class NarrowHeads(Pass):
    """Narrower values: smaller linears, a smaller key-value cache, and no product more.

    Before::

        v = self.v(x).view(b, t, 8, 128).transpose(1, 2)     # Linear(4096, 1024)
        z = scaled_dot_product_attention(q, k, v)
        y = self.o(z.transpose(1, 2).reshape(b, t, -1))      # Linear(4096, 4096)

    After::

        v = self.v(x).view(b, t, 8, 80).transpose(1, 2)      # Linear(4096, 640), other weights
        z = scaled_dot_product_attention(q, k, v)
        y = self.o(z.transpose(1, 2).reshape(b, t, -1))      # Linear(2560, 4096), other weights

    Where one product was taken apart into queries, keys and values, each is taken from its own
    linear instead. ``apart`` says that the linears stand in a graph side by side, each for itself,
    so that what is between them cannot be seen: the pass then refuses.
    """

    name: ClassVar[str] = "narrow-heads"
    exact: ClassVar[bool] = False

    selections: tuple[NarrowedHeads, ...] = ()
    apart: bool = False

    def requires(self, gm: fx.GraphModule) -> None:
        known = slices(gm)
        seen: set[str] = set()
        for one in self.selections:
            check_together(self.name, one.name, apart=self.apart)
            if not 1 <= one.kept <= one.of:
                raise RequiresError(
                    f"{self.name}: {one.name!r} keeps a width of {one.kept} of {one.of}, expected "
                    f"1 to {one.of}"
                )
            check_whole(self.name, one.name, (*one.values, *one.consumers), known, seen)
            self._check_shapes(gm, one)
            self._between(gm, one)

    def _check_shapes(self, gm: fx.GraphModule, one: NarrowedHeads) -> None:
        known = slices(gm)
        for name, weight in one.values.items():
            linear = linear_at(gm, known[name].module)
            heads, cut = divmod(linear.out_features, one.of)
            expected = heads * one.kept, linear.in_features
            if cut or tuple(weight.shape) != expected:
                raise ShapeError(
                    f"{self.name}: {name!r} has {linear.out_features} rows of heads of {one.of} "
                    f"and gets a weight {tuple(weight.shape)}; expected {expected}"
                )
        for name, weight in one.consumers.items():
            linear = linear_at(gm, known[name].module)
            heads, cut = divmod(linear.in_features, one.of)
            expected = linear.out_features, heads * one.kept
            if cut or tuple(weight.shape) != expected:
                raise ShapeError(
                    f"{self.name}: {name!r} reads {linear.in_features} inputs of heads of {one.of} "
                    f"and gets a weight {tuple(weight.shape)}; expected {expected}"
                )

    def _between(self, gm: fx.GraphModule, one: NarrowedHeads) -> Heads:
        calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
        reading = [node for name in one.consumers for node in calls.get(name, [])]
        made = {n: name for name, at in slices(gm).items() for n in calls.get(at.module, [])}

        def leaf(node: fx.Node) -> dict[str, int] | None:
            name = made.get(node)
            return None if name is None else {name: linear_at(gm, name).out_features}

        inputs = linear_at(gm, next(iter(one.consumers))).in_features
        try:
            found = attention_heads(gm, reading, leaf, inputs)
        except NotHeads as fault:
            raise RequiresError(
                f"{self.name}: {next(iter(one.consumers))!r} {fault}; leave {one.name!r} out"
            ) from fault
        if (found.width, list(found.slices)) != (one.of, list(one.values)):
            raise RequiresError(
                f"{self.name}: {one.name!r} has heads of {one.of} in {list(one.values)[:4]}; the "
                f"graph has {found.width} in {list(found.slices)[:4]}"
            )
        outside = [
            node
            for node, name in made.items()
            if name in one.values and node not in found.leaves and node.users
        ]
        if outside:
            raise RequiresError(
                f"{self.name}: node {outside[0].name!r} computes values of {one.name!r} for "
                "something else; leave it out"
            )
        return found

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for one in self.selections:
            if one.kept == one.of:
                continue  # as it is
            between = self._between(gm, one)
            for rows, weights in ((True, one.values), (False, one.consumers)):
                for name, weight in weights.items():
                    put_weight(gm, name, weight, one.biases.get(name))
                    size = len(weight) if rows else weight.shape[1]
                    units = KeptUnits(one.name, one.of, tuple(range(one.kept)), size // one.kept)
                    place = slices(gm)[name]
                    place = (
                        replace(place, stop=size, unit_rows=units)
                        if rows
                        else replace(place, unit_columns=units)
                    )
                    set_slices(gm, {name: place})
                    count += 1
            narrow(gm, between, one.kept)
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for one in self.selections:
            for name in one.values:
                found = linear_at(gm, slices(gm)[name].module).out_features
                if found % one.kept:
                    raise EnsuresError(
                        f"{self.name}: {name!r} has {found} rows, expected heads of {one.kept}"
                    )


__all__ = ["NarrowHeads", "NarrowedHeads"]
