"""Leave hidden units out of the linears that compute and read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError, ShapeError
from passes.graph.graph import calls_by_target, linear_at, new_linear, put_module, put_weight
from passes.graph.hidden import Hidden, NotHidden, hidden_units
from passes.graph.resizing import resize
from passes.graph.slices import KeptUnits, set_slices, slices
from passes.sharing.whole import check_whole


@dataclass(frozen=True, eq=False)
class SelectedUnits:
    """The hidden units of one MLP that stay.

    ``kept`` are ``K`` of the ``of`` units, ascending. ``producers`` are the slices whose rows the
    units are, and how many runs of them each has (two where gate and up are one weight); of the
    ``alternating`` ones, how many neighbours each unit is (gate and up row by row in turn).
    ``consumers`` maps the slices that read the units to their new weights ``(out, K)``, which make
    up for the units that go, and ``biases`` some of them to a new bias.
    """

    name: str
    kept: tuple[int, ...]
    of: int
    producers: Mapping[str, int]
    consumers: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    alternating: frozenset[str] = frozenset()

    def rows(self, producer: str) -> KeptUnits:
        """Which rows of a producer stay."""
        number = self.producers[producer]
        parts, each = (1, number) if producer in self.alternating else (number, 1)
        return KeptUnits(self.name, self.of, self.kept, parts, each)


@dataclass(frozen=True, eq=False)
class SelectUnits(Pass):
    """Fewer hidden units: smaller linears, and no product more.

    Before::

        h = silu(self.gate(x)) * self.up(x)           # Linear(4096, 11008), twice
        y = self.down(h)                              # Linear(11008, 4096)

    After::

        h = silu(self.gate(x)) * self.up(x)           # Linear(4096, 5504), some of the rows
        y = self.down(h)                              # Linear(5504, 4096), other weights

    The text stays, but for views and splits between that name the number of units. ``apart`` says
    that the linears stand in a graph side by side, each for itself, so that what is between them
    cannot be seen.
    """

    name: ClassVar[str] = "select-units"
    exact: ClassVar[bool] = False

    selections: tuple[SelectedUnits, ...] = ()
    apart: bool = False

    def requires(self, gm: fx.GraphModule) -> None:
        known = slices(gm)
        seen: set[str] = set()
        for one in self.selections:
            if not _is_selection(one.kept, one.of):
                raise RequiresError(
                    f"{self.name}: {one.name!r} keeps units that are not ascending numbers from 0 "
                    f"to {one.of - 1}"
                )
            check_whole(self.name, one.name, (*one.producers, *one.consumers), known, seen)
            for name, parts in one.producers.items():
                rows = linear_at(gm, known[name].module).out_features
                if rows != parts * one.of:
                    raise ShapeError(
                        f"{self.name}: {name!r} has {rows} rows, expected {parts} times {one.of}"
                    )
            for name, weight in one.consumers.items():
                linear = linear_at(gm, known[name].module)
                expected = (linear.out_features, len(one.kept))
                if linear.in_features != one.of or tuple(weight.shape) != expected:
                    raise ShapeError(
                        f"{self.name}: {name!r} reads {linear.in_features} inputs and gets a "
                        f"weight {tuple(weight.shape)}; expected {one.of} and {expected}"
                    )
            if not self.apart:
                self._between(gm, one)

    def _between(self, gm: fx.GraphModule, one: SelectedUnits) -> Hidden:
        calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
        reading = [node for name in one.consumers for node in calls.get(name, [])]
        rows = {node: name for name in one.producers for node in calls.get(name, [])}
        try:
            found = hidden_units(gm, reading, lambda node: _rows_of(gm, node, rows), one.of)
        except NotHidden as fault:
            raise RequiresError(
                f"{self.name}: {next(iter(one.consumers))!r} {fault}; leave {one.name!r} out"
            ) from fault
        outside = [node for node in rows if node not in found.leaves and not _joins(node, found)]
        if outside:
            raise RequiresError(
                f"{self.name}: node {outside[0].name!r} computes units of {one.name!r} for "
                "something else; leave it out"
            )
        torn = {name for node, name in found.leaves.items() if node not in rows}
        odd = (found.alternating ^ one.alternating) | (found.alternating & torn)
        if odd:
            raise RequiresError(
                f"{self.name}: of {min(odd)!r} the rows of a unit of {one.name!r} are "
                f"{'' if min(odd) in found.alternating else 'no '}neighbours in one slice"
            )
        return found

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for one in self.selections:
            if len(one.kept) == one.of:
                continue  # as it is
            between = None if self.apart else self._between(gm, one)
            for name in one.producers:
                _keep_rows(gm, name, one.rows(name))
                count += 1
            for name, weight in one.consumers.items():
                put_weight(gm, name, weight, one.biases.get(name))
                units = KeptUnits(one.name, one.of, one.kept)
                set_slices(gm, {name: replace(slices(gm)[name], unit_columns=units)})
                count += 1
            for node in () if between is None else between.sized:
                resize(node, one.of, len(one.kept))
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for one in self.selections:
            for name in one.consumers:
                found = linear_at(gm, slices(gm)[name].module).in_features
                if found != len(one.kept):
                    raise EnsuresError(
                        f"{self.name}: {name!r} reads {found} inputs, expected {len(one.kept)}"
                    )


def _is_selection(kept: Sequence[int], of: int) -> bool:
    return (
        bool(kept)
        and all(low < high for low, high in pairwise(kept))
        and kept[0] >= 0
        and kept[-1] < of
    )


def _rows_of(
    gm: fx.GraphModule, node: fx.Node, rows: Mapping[fx.Node, str]
) -> tuple[str, int] | None:
    """The name and width of a producer's result: of one slice, or of all of one weight, which
    :class:`passes.SplitLinear` puts together again."""
    if node in rows:
        return rows[node], linear_at(gm, rows[node]).out_features
    parts = node.args[0] if node.target is torch.cat else None
    if not isinstance(parts, (list, tuple)) or node.kwargs != {"dim": -1}:
        return None
    names = [rows.get(part) if isinstance(part, fx.Node) else None for part in parts]
    if None in names:
        return None
    known = [name for name in names if name is not None]
    return known[0], sum(linear_at(gm, name).out_features for name in known)


def _joins(node: fx.Node, found: Hidden) -> bool:
    return bool(node.users) and all(user in found.leaves for user in node.users)


def _keep_rows(gm: fx.GraphModule, name: str, units: KeptUnits) -> None:
    old = linear_at(gm, name)
    at = units.places().to(old.weight.device)
    bias = None if old.bias is None else old.bias.detach().index_select(0, at)
    linear = new_linear(
        old.weight.detach().index_select(0, at),
        bias,
        requires_grad=old.weight.requires_grad,
        training=gm.training,
    )
    if bias is not None:
        linear.bias.requires_grad_(old.bias.requires_grad)
    put_module(gm, name, linear)
    place = replace(slices(gm)[name], stop=linear.out_features, unit_rows=units)
    set_slices(gm, {name: place})


__all__ = ["SelectUnits", "SelectedUnits"]
