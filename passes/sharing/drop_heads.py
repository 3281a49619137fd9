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
from passes.graph.whole_heads import NotWhole, WholeHeads, whole_heads, without


@dataclass(frozen=True, eq=False)
class DroppedHeads:
    """Some of the key-value heads of one attention, each with the queries that share it.

    ``kept`` are the numbers of those that stay, ascending, of ``of``. ``weights`` maps the slices
    of queries, keys and values, in this order, to the rows that stay, ``consumers`` those that read
    the heads to their new weights ``(out, columns that stay)``; ``biases`` some of both to a new
    bias.
    """

    name: str
    kept: tuple[int, ...]
    of: int
    weights: Mapping[str, Tensor]
    consumers: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


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
            if self.apart:
                raise RequiresError(
                    f"{self.name}: {one.name!r} stands in no graph that shows what is between its "
                    "linears; leave it out"
                )
            ascending = sorted(set(one.kept)) == list(one.kept)
            if not (one.kept and ascending and one.kept[0] >= 0 and one.kept[-1] < one.of):
                raise RequiresError(
                    f"{self.name}: {one.name!r} keeps {list(one.kept)[:8]}, expected ascending "
                    f"numbers from 0 to {one.of - 1}"
                )
            for name in (*one.weights, *one.consumers):
                if name not in known or name in seen or known[name].basis is not None:
                    raise RequiresError(
                        f"{self.name}: {name!r} of {one.name!r} is not a slice that is still "
                        f"whole; the graph has {sorted(known)[:6]}"
                    )
                seen.add(name)
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
        for name, weight in (*one.weights.items(), *one.consumers.items()):
            linear = linear_at(gm, slices(gm)[name].module)
            is_row = name in one.weights
            size = linear.out_features if is_row else linear.in_features
            each, cut = divmod(size, one.of)
            sides = each * len(one.kept), linear.in_features if is_row else linear.out_features
            expected = sides if is_row else sides[::-1]
            if cut or tuple(weight.shape) != expected:
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
        if (found.groups, found.slices) != (one.of, tuple(one.weights)):
            raise RequiresError(
                f"{self.name}: {one.name!r} has {one.of} heads of {list(one.weights)}; the graph "
                f"has {found.groups} of {list(found.slices)}"
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
            found = self._between(gm, one)
            queries, keys, values = found.slices
            edit = without(gm, found.values, one.kept)
            for name in (values, *one.consumers):
                _put(gm, one, name)
            edit()
            # of a product of all three nothing is left as it was found
            calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
            made = {n: name for name, at in slices(gm).items() for n in calls.get(at.module, [])}
            scores = attention_scores(gm, found.scores.calls, partial(_leaf, gm, made))
            edit = without(gm, scores, one.kept)
            for name in (queries, keys):
                _put(gm, one, name)
            edit()
            count += 3 + len(one.consumers)
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for one in self.selections:
            for name in one.weights:
                found = linear_at(gm, slices(gm)[name].module).out_features
                if found % len(one.kept):
                    raise EnsuresError(
                        f"{self.name}: {name!r} has {found} rows, expected {len(one.kept)} heads"
                    )


def _leaf(gm: fx.GraphModule, made: Mapping[fx.Node, str], node: fx.Node) -> dict[str, int] | None:
    name = made.get(node)
    return None if name is None else {name: linear_at(gm, name).out_features}


def _put(gm: fx.GraphModule, one: DroppedHeads, name: str) -> None:
    """The new weight and bias of a slice, and what is recorded of it."""
    is_row = name in one.weights
    weight = (one.weights if is_row else one.consumers)[name]
    put_weight(gm, name, weight, one.biases.get(name))
    size = weight.shape[0 if is_row else 1]
    units = KeptUnits(one.name, one.of, one.kept, each=size // len(one.kept))
    place = slices(gm)[name]
    if is_row:
        place = replace(place, stop=size, unit_rows=units)
    else:
        place = replace(place, unit_columns=units)
    set_slices(gm, {name: place})


__all__ = ["DropHeads", "DroppedHeads"]
