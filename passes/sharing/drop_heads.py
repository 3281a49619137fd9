"""Leave whole heads out of an attention, in the linears that compute and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError, ShapeError
from passes.graph.graph import calls_by_target, linear_at, put_weight
from passes.graph.scores import attention_scores
from passes.graph.slices import KeptUnits, set_slices, slices
from passes.graph.whole_heads import NotWhole, WholeHeads, spans, whole_heads, without
from passes.sharing.whole import check_together, check_whole


@dataclass(frozen=True, eq=False)
class DroppedHeads:
    """Some of the key-value heads of one attention, each with the queries that share it.

    ``kept`` are the numbers of those that stay, ascending, of ``of``. ``queries``, ``keys`` and
    ``values`` map slices, in the order of their heads, to the rows that stay, which may be none;
    ``consumers`` maps those that read the heads to their new weights ``(out, columns that stay)``,
    ``biases`` some of all to a new bias.
    """

    name: str
    kept: tuple[int, ...]
    of: int
    queries: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    consumers: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All rows that stay, by slice."""
        return {**self.queries, **self.keys, **self.values}

    @property
    def slices(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The slices of queries, keys and values."""
        return tuple(self.queries), tuple(self.keys), tuple(self.values)


@dataclass(frozen=True, eq=False)
class DropHeads(Pass):
    """Fewer heads: smaller linears, less attention, a smaller key-value cache.

    Before::

        q = self.q(x).view(b, t, 32, 128).transpose(1, 2)   # Linear(4096, 4096)
        k = self.k(x).view(b, t, 8, 128).transpose(1, 2)    # Linear(4096, 1024)
        v = self.v(x).view(b, t, 8, 128).transpose(1, 2)    # Linear(4096, 1024)
        z = scaled_dot_product_attention(q, k, v)
        y = self.o(z.transpose(1, 2).reshape(b, t, -1))     # Linear(4096, 4096)

    After::

        q = self.q(x).view(b, t, 24, 128).transpose(1, 2)   # Linear(4096, 3072), some of the rows
        k = self.k(x).view(b, t, 6, 128).transpose(1, 2)    # Linear(4096, 768), likewise
        v = self.v(x).view(b, t, 6, 128).transpose(1, 2)    # Linear(4096, 768), likewise
        z = scaled_dot_product_attention(q, k, v)
        y = self.o(z.transpose(1, 2).reshape(b, t, -1))     # Linear(3072, 4096), other weights

    ``apart`` says that the linears stand in a graph side by side, each for itself: the pass then
    refuses.
    """

    name: ClassVar[str] = "drop-heads"
    exact: ClassVar[bool] = False

    selections: tuple[DroppedHeads, ...] = ()
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
            check_whole(self.name, one.name, (*one.weights, *one.consumers), known, seen)
            self._check_shapes(gm, one)
            found = self._between(gm, one)
            for heads in (found.values, found.scores):
                try:
                    without(gm, heads, one.kept)
                except NotWhole as fault:
                    raise self._refused(one, fault) from fault

    def _refused(self, one: DroppedHeads, fault: NotWhole) -> RequiresError:
        return RequiresError(
            f"{self.name}: {next(iter(one.consumers))!r} {fault}; leave {one.name!r} out"
        )

    def _check_shapes(self, gm: fx.GraphModule, one: DroppedHeads) -> None:
        units = _units(gm, one)
        for name, weight in (*one.weights.items(), *one.consumers.items()):
            linear = linear_at(gm, slices(gm)[name].module)
            is_row, own = name in one.weights, units[name]
            size = linear.out_features if is_row else linear.in_features
            sides = own.size, linear.in_features if is_row else linear.out_features
            expected = sides if is_row else sides[::-1]
            if own.whole_size != size or tuple(weight.shape) != expected:
                raise ShapeError(
                    f"{self.name}: {name!r} has {size} {'rows' if is_row else 'inputs'} of "
                    f"{one.of} heads and gets a weight {tuple(weight.shape)}; expected {expected}"
                )

    def _between(self, gm: fx.GraphModule, one: DroppedHeads) -> WholeHeads:
        calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
        made = {n: name for name, at in slices(gm).items() for n in calls.get(at.module, [])}
        reading = [node for name in one.consumers for node in calls.get(name, [])]
        inputs = linear_at(gm, next(iter(one.consumers))).in_features
        try:
            found = whole_heads(gm, reading, partial(_leaf, gm, made), inputs)
        except NotWhole as fault:
            raise self._refused(one, fault) from fault
        if (found.groups, found.slices) != (one.of, one.slices):
            raise RequiresError(
                f"{self.name}: {one.name!r} has {one.of} heads of {list(one.weights)[:4]}; the "
                f"graph has {found.groups} of {[n for own in found.slices for n in own][:4]}"
            )
        leaves = {*found.values.leaves, *found.scores.leaves}
        outside = [n for n, name in made.items() if name in one.weights and n not in leaves]
        if any(node.users for node in outside):
            raise RequiresError(
                f"{self.name}: node {outside[0].name!r} computes heads of {one.name!r} for "
                "something else; leave it out"
            )
        return found

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for one in self.selections:
            if len(one.kept) == one.of:
                continue  # as it is
            found, units = self._between(gm, one), _units(gm, one)
            edit = without(gm, found.values, one.kept)
            for name in (*one.values, *one.consumers):
                _put(gm, one, units[name], name)
            edit()
            # of a product of all three nothing is left as it was found
            calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
            made = {n: name for name, at in slices(gm).items() for n in calls.get(at.module, [])}
            scores = attention_scores(gm, found.scores.calls, partial(_leaf, gm, made))
            edit = without(gm, scores, one.kept)
            for name in (*one.queries, *one.keys):
                _put(gm, one, units[name], name)
            edit()
            count += len(units)
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for one in self.selections:
            for weights in (one.queries, one.keys, one.values):
                found = sum(linear_at(gm, slices(gm)[n].module).out_features for n in weights)
                if found % len(one.kept):
                    raise EnsuresError(
                        f"{self.name}: {next(iter(weights))!r} and others have {found} rows, "
                        f"expected {len(one.kept)} heads"
                    )


def _units(gm: fx.GraphModule, one: DroppedHeads) -> dict[str, KeptUnits]:
    """Which heads every slice has, and which of them stay."""
    found = {}
    for weights in (one.queries, one.keys, one.values):
        rows = {name: linear_at(gm, slices(gm)[name].module).out_features for name in weights}
        for name, span in spans(rows, one.of).items():
            each = rows[name] // (span[1] - span[0])
            found[name] = KeptUnits(one.name, one.of, one.kept, each=each, span=span)
    for name in one.consumers:
        each = linear_at(gm, slices(gm)[name].module).in_features // one.of
        found[name] = KeptUnits(one.name, one.of, one.kept, each=each)
    return found


def _leaf(gm: fx.GraphModule, made: Mapping[fx.Node, str], node: fx.Node) -> dict[str, int] | None:
    name = made.get(node)
    return None if name is None else {name: linear_at(gm, name).out_features}


def _put(gm: fx.GraphModule, one: DroppedHeads, units: KeptUnits, name: str) -> None:
    """The new weight and bias of a slice, and what is recorded of it."""
    is_row = name in one.weights
    weight = (one.weights if is_row else one.consumers)[name]
    put_weight(gm, name, weight, one.biases.get(name))
    place = slices(gm)[name]
    if is_row:
        place = replace(place, stop=len(weight), unit_rows=units)
    else:
        place = replace(place, unit_columns=units)
    set_slices(gm, {name: place})


__all__ = ["DropHeads", "DroppedHeads"]
