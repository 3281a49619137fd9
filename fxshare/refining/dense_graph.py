"""The dense model on the graph of a compiled one: the same nodes, other weights.

What lies between two nodes of it is then what the same nodes of the compiled graph stand for, which
is what blocks are compared by.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxshare.errors import RefineError
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from fxshare.sites.site import Site
from fxshare.sites.tensors import site_tensors
from passes.graph.graph import linear_at, new_linear, put_module, structure_copy
from passes.graph.lookups import is_embedding
from passes.graph.slices import Slice, gather_order

_WAY_OUT = "take objective='kl' or 'hidden', which train the whole at once"


@dataclass(frozen=True)
class Product:
    """One call of a coefficient. ``nodes`` compute it from ``source``, first to last; ``order`` is
    that of the inputs in ``source``, where a gather was folded into what writes it."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    order: Tensor | None = None

    @property
    def call(self) -> fx.Node:
        """The coefficient's."""
        return self.nodes[-1]


def products_of(gm: nn.Module) -> list[Product]:
    """Every call of a coefficient, and of rows without a basis, in the graph's order.

    Raises :class:`RefineError` for what is no graph, or where a lookup is factored.
    """
    if not isinstance(gm, fx.GraphModule):
        raise RefineError(
            f"objective='blocks' cuts a graph, and {type(gm).__name__} was captured at module "
            f"granularity; {_WAY_OUT}"
        )
    places = {place.module: place for place in slices_of(gm).values()}
    found = []
    for node in gm.graph.nodes:
        place = places.get(str(node.target)) if node.op == "call_module" else None
        if place is None:
            continue
        if is_embedding(gm.get_submodule(place.module)):
            raise RefineError(
                f"objective='blocks': {place.module!r} is an embedding in factors, which is in no "
                f"block; {_WAY_OUT}"
            )
        found.append(_product(gm, node, place))
    return found


def _product(gm: nn.Module, call: fx.Node, place: Slice) -> Product:
    nodes, source, order = [call], _input(call), None
    if place.basis is not None:
        nodes.insert(0, source)
        if place.pivoted:  # kept + table(rest), both pieces of a gather or of what was gathered
            kept, table = (_at(source, at) for at in range(2))
            rest = _input(table)
            pieces = _input(rest)
            nodes[:0] = [pieces, kept, rest, table]
            source = _input(pieces)
            if source.target is torch.index_select:
                nodes.insert(0, source)
                source = _input(source)
            else:
                order = gather_order(gm, place.basis)
            whole = kept.target is rest.target is operator.getitem
            if not whole or pieces.target is not torch.split:
                raise _unknown(call)
            source_of = table
        else:
            source_of, source = source, _input(source)
        if source_of.target != place.basis:
            raise _unknown(call)
    return Product(tuple(nodes), source, order)


def _input(node: fx.Node) -> fx.Node:
    return _at(node, 0)


def _at(node: fx.Node, at: int) -> fx.Node:
    found = node.args[at] if at < len(node.args) else None
    if not isinstance(found, fx.Node):
        raise _unknown(node)
    return found


def _unknown(node: fx.Node) -> RefineError:
    return RefineError(
        f"objective='blocks': the graph computes {str(node.target)!r} in a way that is not known; "
        f"{_WAY_OUT}"
    )


def dense_graph(gm: nn.Module, model: nn.Module) -> fx.GraphModule:
    """A copy of ``gm``, which shares its tensors with ``model``, that computes what ``model``
    does."""
    products = products_of(gm)
    assert isinstance(gm, fx.GraphModule)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    instead: dict[int, object] = {}
    for name, own in gm.named_parameters(remove_duplicate=False):
        dense = theirs.get(name)
        tensor = dense if dense is not None and dense.shape == own.shape else own
        instead.setdefault(id(own), nn.Parameter(tensor.detach(), requires_grad=False))
    copy = structure_copy(gm, memo=instead, without_code=True)
    for name, (weight_OI, bias) in _weights(gm, model).items():
        put_module(copy, name, new_linear(weight_OI, bias, requires_grad=False, training=False))
    nodes = {node.name: node for node in copy.graph.nodes}
    for product in products:
        call = nodes[product.call.name]
        call.args = (nodes[product.source.name],)
        if product.order is not None:
            linear = linear_at(copy, str(call.target))
            weight_OI = linear.weight.detach()
            columns = weight_OI.index_select(1, product.order.to(weight_OI.device))
            linear.weight = nn.Parameter(columns, requires_grad=False)
    copy.recompile()
    return copy


def _weights(gm: nn.Module, model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The dense weight and bias of every linear that has slices, in the order of its rows."""
    rows: dict[str, list[tuple[int, Tensor, Tensor | None]]] = {}
    for site, name, place in _placed(gm):
        weight_OI, bias = site_tensors(model, site)
        s = next(s for s in site.slices if s.name == name)
        parts = [weight_OI[s.start : s.stop], None if bias is None else bias[s.start : s.stop]]
        order = None if place.folded is None else gather_order(gm, place.folded)
        if order is not None:
            parts = [p if p is None else p.index_select(0, order.to(p.device)) for p in parts]
        assert parts[0] is not None
        rows.setdefault(place.module, []).append((place.start, parts[0], parts[1]))
    found = {}
    for module, given in rows.items():
        given.sort(key=lambda one: one[0])
        biases = [bias for _, _, bias in given if bias is not None]
        whole = [weight for _, weight, _ in given]
        found[module] = (
            whole[0].detach() if len(whole) == 1 else torch.cat(whole).detach(),
            torch.cat(biases).detach() if biases else None,
        )
    return found


def _placed(gm: nn.Module) -> Iterator[tuple[Site, str, Slice]]:
    places = slices_of(gm)
    for site in record_of(gm).plan.sites:
        for s in site.slices:
            yield site, s.name, places[s.name]


__all__ = ["Product", "dense_graph", "products_of"]
