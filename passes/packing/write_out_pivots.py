"""Store pivoted bases whole where gathering their inputs costs more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import bits_of, linear_at, new_linear
from passes.graph.lookups import only_called
from passes.graph.slices import basis_matrix, set_slices, slices
from passes.packing.materialise import Product, upwards
from passes.packing.merge_gathers import merge_gathers


@dataclass(frozen=True)
class WriteOutPivots(Pass):
    """Pivoted bases of low rank that read one input become plain ones, which can be stacked.

    Before::

        gathered = torch.index_select(x, -1, self.gather_0)
        kept_0, rest_0, kept_1, rest_1 = torch.split(gathered, [R, I - R, R, I - R], -1)
        z0 = kept_0 + self.basis_0(rest_0)              # Linear(I - R, R)
        z1 = kept_1 + self.basis_1(rest_1)

    After::

        z0 = self.basis_0(x)                            # Linear(I, R)
        z1 = self.basis_1(x)

    Written out, a basis needs ``R²`` more multiplications for each token, and moves ``I`` numbers
    less. ``price`` is how many multiplications moving a number is worth: of I = 1024, three bases
    of rank 299 take the same time either way, 12 of rank 112 1.3 times as long pivoted, 48 of rank
    31 four times. It stores ``R (R - 1)`` more numbers, so it is for speed only. A basis alone at
    its input stays, because stacking it with nothing gains nothing.
    """

    name: ClassVar[str] = "write-out-pivots"
    exact: ClassVar[bool] = True

    price: int = 16

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = only_called(gm)
        readers: dict[str, set[str]] = {}
        for place in slices(gm).values():
            if place.pivoted and place.basis in calls:
                readers.setdefault(place.basis, set()).add(place.module)
        found: dict[str, list[Product]] = {}
        for basis, modules in readers.items():
            made = [Product.of(gm, node, modules) for node in calls[basis]]
            known = [product for product in made if product is not None and not product.folded]
            if len(known) == len(made) and self._pays(gm, basis):
                found[basis] = known
        inputs = [product.input for products in found.values() for product in products]
        wanted = {
            basis: products
            for basis, products in found.items()
            if all(inputs.count(product.input) > 1 for product in products)
        }
        for basis, products in wanted.items():
            for product in products:
                _read_whole(gm, basis, product)
        if wanted:
            merge_gathers(gm)  # they hold pieces for these bases, and need to know their orders
        for basis in wanted:
            _write_out(gm, basis)
        return sum(len(products) for products in wanted.values())

    def _pays(self, gm: fx.GraphModule, basis: str) -> bool:
        linear = linear_at(gm, basis)
        rank, features = linear.out_features, linear.in_features + linear.out_features
        if bits_of(linear.weight) is not None:  # the identity has no codes of these scales
            return False
        return rank * rank < self.price * features


def _read_whole(gm: fx.GraphModule, basis: str, product: Product) -> None:
    with gm.graph.inserting_before(product.sum):
        z = gm.graph.call_module(basis, (product.input,))
    z.meta.update(product.basis.meta)
    product.sum.replace_all_uses_with(z)
    for node in upwards(product):
        if not node.users:
            gm.graph.erase_node(node)


def _write_out(gm: fx.GraphModule, basis: str) -> None:
    old = linear_at(gm, basis)
    whole_RI, trainable = _whole(gm, basis, old), old.weight.requires_grad
    plain = new_linear(whole_RI, None, requires_grad=trainable, training=gm.training)
    gm.add_module(basis, plain)
    places = {name: place for name, place in slices(gm).items() if place.basis == basis}
    set_slices(gm, {name: replace(place, pivoted=False) for name, place in places.items()})


def _whole(gm: fx.GraphModule, basis: str, old: nn.Linear) -> Tensor:
    table_RT = old.weight.detach()
    if table_RT.device.type == "meta":
        return table_RT.new_empty(len(table_RT), sum(table_RT.shape))
    return basis_matrix(gm, basis, pivoted=True).detach().contiguous()
