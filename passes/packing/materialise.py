"""Multiply out what costs more as a product of two than as one."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import bits_of, linear_at, new_linear, put_module
from passes.graph.lookups import only_called
from passes.graph.origins import put_back
from passes.graph.slices import basis_matrix, rows_of, set_slices, slices
from passes.graph.writes import is_written
from passes.packing.merge_gathers import merge_gathers


@dataclass(frozen=True)
class Materialise(Pass):
    """Past break-even, a basis and its coefficients become dense weights.

    Before::

        z = self.basis_q(x)                            # Linear(I, R)
        q = self.q_proj(z)                             # Linear(R, O)

    After::

        q = self.q_proj(x)                             # Linear(I, O), R (I + O) >= I O

    Counted over all places where the basis is read, in multiplications; ``margin`` is how many
    times as many the dense products may need. The weights of several layers that shared the basis
    are stored apart then: more numbers, fewer operations.
    """

    name: ClassVar[str] = "materialise"
    exact: ClassVar[bool] = True

    margin: float = 1.0

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = only_called(gm)
        coefficients: dict[str, dict[str, bool]] = {}
        for place in slices(gm).values():
            if place.basis is not None and place.basis_rows is None:
                coefficients.setdefault(place.basis, {})[place.module] = place.pivoted
        count, gone = 0, []
        for basis, modules in coefficients.items():
            products = [Product.of(gm, node, modules) for node in calls.get(basis, [])]
            if not products or any(product is None for product in products):
                continue
            # codes are there for their bytes, which the product has several times of
            if bits_of(linear_at(gm, basis).weight) is not None:
                continue
            found = [product for product in products if product is not None]
            readers = {node for product in found for node in product.readers}
            # a coefficient that reads two bases (or is dead) is not this basis' alone
            if any(set(calls.get(name, [])) - readers for name in modules):
                continue
            factored = sum(product.factored(gm) for product in found)
            if factored * self.margin < sum(product.dense(gm) for product in found):
                continue
            _multiply_out(gm, basis, modules, found)
            gone.append(basis)
            count += len(found)
        if gone:
            merge_gathers(gm)  # they hold pieces for bases that are no more
        for basis in gone:
            delattr(gm, basis)
        return count


@dataclass(frozen=True)
class Product:
    """One basis product in the graph, and what is made of it."""

    basis: fx.Node
    input: fx.Node
    """What a dense linear reads instead."""
    sum: fx.Node
    """The node that the coefficients read."""
    readers: tuple[fx.Node, ...]
    folded: bool
    """Whether the input comes in the pivoted basis' own order."""

    @staticmethod
    def of(gm: fx.GraphModule, node: fx.Node, modules: Iterable[str]) -> Product | None:
        """None where the graph around the product is not as our passes make it."""
        x, product, folded = node.args[0], node, False
        if not isinstance(x, fx.Node):
            return None
        if hasattr(gm.get_submodule(str(node.target)), "kept"):
            if len(node.users) != 1 or x.target is not operator.getitem:
                return None
            (product,) = node.users
            split = x.args[0]
            if product.target is not torch.add or not isinstance(split, fx.Node):
                return None
            source = split.args[0]
            assert isinstance(source, fx.Node)
            folded = source.target is not torch.index_select
            x = source if folded else source.args[0]
            assert isinstance(x, fx.Node)
        readers = tuple(product.users)
        known = set(modules)
        if any(r.op != "call_module" or r.target not in known for r in readers):
            return None
        if is_written(x) or is_written(product):
            return None
        return Product(node, x, product, readers, folded)

    def _sizes(self, gm: fx.GraphModule) -> tuple[int, int, int, int]:
        linear = linear_at(gm, str(self.basis.target))
        heights = sum(linear_at(gm, str(r.target)).out_features for r in self.readers)
        pivoted = linear.out_features if hasattr(linear, "kept") else 0
        return linear.in_features, linear.out_features, heights, pivoted

    def factored(self, gm: fx.GraphModule) -> int:
        """Multiplications per token as it is."""
        read, rank, heights, _ = self._sizes(gm)
        return rank * (read + heights)

    def dense(self, gm: fx.GraphModule) -> int:
        """Multiplications per token when multiplied out."""
        read, _, heights, kept = self._sizes(gm)
        return (read + kept) * heights


def _multiply_out(
    gm: fx.GraphModule, basis: str, modules: dict[str, bool], products: list[Product]
) -> None:
    _unfold(gm, basis)
    for name, pivoted in modules.items():
        old = linear_at(gm, name)
        weight_OI = _dense_weight(gm, old, basis, pivoted=pivoted)
        dense = new_linear(
            weight_OI, None, requires_grad=old.weight.requires_grad, training=gm.training
        )
        dense.bias = old.bias
        put_module(gm, name, dense)
        places = {key: place for key, place in slices(gm).items() if place.module == name}
        dry = {key: replace(p, basis=None, pivoted=False) for key, p in places.items()}
        set_slices(gm, dry)
    for product in products:
        for reader in product.readers:
            reader.replace_input_with(product.sum, product.input)
        for node in upwards(product):
            if not node.users:
                gm.graph.erase_node(node)


def _unfold(gm: fx.GraphModule, basis: str) -> None:
    """Put rows that are in the order of a pivoted basis back in their own: it goes away, and in
    another layer it may read inputs that were never put in its order."""
    for name, place in slices(gm).items():
        if place.folded != basis:
            continue
        old = linear_at(gm, place.module)
        plain = new_linear(
            rows_of(gm, place, old.weight.detach()),
            None if old.bias is None else rows_of(gm, place, old.bias.detach()),
            requires_grad=old.weight.requires_grad,
            training=gm.training,
        )
        if old.bias is not None:
            plain.bias.requires_grad_(old.bias.requires_grad)
        for leaf, buffer in old.named_buffers(recurse=False):
            plain.register_buffer(leaf, buffer)
        put_module(gm, place.module, plain)
        set_slices(gm, {name: replace(place, folded=None)})
        put_back(gm, basis)


def _dense_weight(
    gm: fx.GraphModule, coefficient: nn.Linear, basis: str, *, pivoted: bool
) -> Tensor:
    weight_OR = coefficient.weight.detach()
    table = linear_at(gm, basis).weight.detach()
    features = sum(table.shape) if pivoted else table.shape[1]
    if weight_OR.device.type == "meta":
        return weight_OR.new_empty(len(weight_OR), features)
    basis_RI = basis_matrix(gm, basis, pivoted=pivoted).detach().double()
    return (weight_OR.double() @ basis_RI).to(weight_OR.dtype)


def upwards(product: Product) -> list[fx.Node]:
    """The nodes that made the product from its input, last first."""
    nodes, stack = [product.sum], [product.sum]
    while stack:
        inputs = stack.pop().all_input_nodes
        new = [n for n in inputs if n is not product.input and n not in nodes]
        nodes += new
        stack += new
    order = {node: at for at, node in enumerate(product.basis.graph.nodes)}
    return sorted(nodes, key=lambda node: -order[node])
