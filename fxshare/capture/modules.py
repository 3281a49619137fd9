"""Capture at module granularity: every linear is a graph of its own, the rest stays Python.

Needs no example inputs and follows every path of the model; a Hugging Face class keeps its cache,
labels and ``generate``. The price: no product is reused from one module to the next.

The passes work on *one* graph whose inputs and outputs are those of all the linears, side by side;
:func:`put_back` cuts the rewritten graph into pieces and puts each where its linear was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxshare.errors import CaptureError
from passes.graph.closures import rebind
from passes.graph.graph import is_conv1d, is_linear, structure_copy, weight_and_bias
from passes.graph.names import unwritable
from passes.graph.slices import Slice, rows_of, set_slices, slice_weight, slices
from passes.packing.lay_out import rows_again
from passes.sharing.pivot_basis import gathers, set_gathers


class BorrowedBasis(nn.Module):
    """Calls a basis that the root module owns, without owning it: one state-dict key per basis."""

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.__dict__["_owner"] = owner

    def forward(self, x: Tensor) -> Tensor:
        """The basis product ``(..., R)`` of ``x`` ``(..., I)``."""
        product: Tensor = self.__dict__["_owner"](x)
        return product

    @property
    def weight(self) -> Tensor:
        """The owner's weight."""
        weight: Tensor = self.__dict__["_owner"].weight
        return weight

    @property
    def bias(self) -> None:
        """A basis has none."""

    @property
    def kept(self) -> Tensor:
        """The owner's kept inputs, where it has some (:class:`passes.PivotBasis`)."""
        kept: Tensor = self.__dict__["_owner"].kept
        return kept


class RewrittenLinear(fx.GraphModule):
    """A rewritten site of a model's own class.

    ``weight`` and ``bias`` are multiplied out anew at each read, for code that looks at them beside
    calling the module (the fast path of ``nn.TransformerEncoderLayer``, dtype checks).
    """

    @property
    def weight(self) -> Tensor:
        """``(out, in)``, or ``(in, out)`` where a ``Conv1D`` was."""
        whole_OI = torch.cat([slice_weight(self, name) for name in slices(self)])
        return whole_OI.t() if self.meta["transposed"] else whole_OI

    @property
    def bias(self) -> Tensor | None:
        """``(out,)``; None where the site has none."""
        rows = []
        for place in slices(self).values():
            _, bias = weight_and_bias(self.get_submodule(place.module))
            if bias is None:
                return None
            rows.append(rows_of(self, place, bias))
        return torch.cat(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        rows_again(self)
        return moved


def linears_side_by_side(model: nn.Module) -> fx.GraphModule:
    """One graph with an input, a linear call and an output for every linear module of ``model``."""
    root = structure_copy(model)
    names = [
        name
        for name, module in root.named_modules(remove_duplicate=False)
        # nn.MultiheadAttention never calls its out_proj, it reads the weight
        if is_linear(module)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        # nor can code hold every name; what matches such a one is refused by the matching
        and unwritable(name) is None
    ]
    if not names:
        raise CaptureError(
            f"{type(model).__name__} has no nn.Linear or Conv1D module; capture='modules' can "
            "only rewrite such modules, try capture='fx' or 'export' with an example"
        )
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x_{number}") for number in range(len(names))]
    calls = [graph.call_module(name, (x,)) for name, x in zip(names, inputs, strict=True)]
    graph.output(dict(zip(names, calls, strict=True)))
    return fx.GraphModule(root, graph, type(model).__name__)


def put_back(
    model: nn.Module, rewritten: fx.GraphModule, sites: Iterable[str], *, copy: bool
) -> nn.Module:
    """A structure copy of ``model`` in which each site is the rewritten piece of the graph."""
    sites = list(sites)
    # the pieces hold views of the source's weights and biases
    rewritten = structure_copy(
        rewritten, clone_parameters=copy, clone_buffers=False, without_code=True
    )
    result = structure_copy(_without(model, sites), clone_parameters=copy)
    empty = {name: result.get_submodule(name) for name in sites}
    (output,) = (node for node in rewritten.graph.nodes if node.op == "output")
    results: Any = output.args[0]
    places: dict[str, Slice] = {}
    derived: dict[str, tuple[str, ...]] = {}
    bases = {place.basis for place in slices(rewritten).values() if place.basis}
    for name in sorted(bases):
        result.add_module(name, rewritten.get_submodule(name))
    for name in sites:
        piece, moved = _piece(rewritten, name, sites, results[name], bases)
        piece.meta["transposed"] = is_conv1d(model.get_submodule(name))
        result.set_submodule(name, piece)
        for slice_name, place in slices(rewritten).items():
            if place.module in moved:
                set_slices(piece, {slice_name: replace(place, module=moved[place.module])})
                new = f"{name}.{moved[place.module]}"
                places.setdefault(slice_name, replace(place, module=new))
        for gather, order in gathers(rewritten).items():
            if hasattr(piece, gather):
                derived[f"{name}.{gather}"] = order
    # what reaches a site through a list or a closure has the empty one
    rebind(result, {id(empty[name]): result.get_submodule(name) for name in sites})
    holder = result.__dict__.setdefault("meta", {})
    holder["slices"] = places
    set_gathers(result, derived)
    return result


def _without(model: nn.Module, sites: list[str]) -> nn.Module:
    """The model with the sites' modules replaced by empty ones, so their weights are not copied."""
    shared = structure_copy(model, clone_buffers=False)
    full = {name: shared.get_submodule(name) for name in sites}
    for name in sites:
        shared.set_submodule(name, nn.Module())
    rebind(shared, {id(full[name]): shared.get_submodule(name) for name in sites})
    return shared


def _piece(
    rewritten: fx.GraphModule, site: str, sites: Sequence[str], result: fx.Node, bases: set[str]
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph from the site's input to its output, and the new name of each module in it."""
    needed: set[fx.Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    root, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    moved: dict[str, str] = {}
    for node in rewritten.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            copies[node] = graph.placeholder("x")
            continue
        new = graph.node_copy(node, lambda old: copies[old])
        if node.op == "get_attr":  # the index of a gather
            index = getattr(rewritten, str(node.target))
            root.register_buffer(str(node.target), index, persistent=False)
        if node.op == "call_module":
            target = str(node.target)
            module = rewritten.get_submodule(target)
            if target in bases:
                assert isinstance(module, nn.Linear)
                local, module = target, BorrowedBasis(module)
            else:
                local = _local_name(target, site, sites)
                assert local not in moved.values() or moved.get(target) == local, (target, moved)
                moved[target] = local
            _add(root, local, module)
            new.target = local
        copies[node] = new
    graph.output(copies[result])
    root.train(rewritten.training)
    return RewrittenLinear(root, graph, type(rewritten).__name__), moved


def _local_name(target: str, site: str, sites: Sequence[str]) -> str:
    """The name within its piece of a module that replaces rows of a site: of this one, or of the
    one that it is tied to."""
    for owner in (site, *sites):
        if target.startswith(f"{owner}."):
            return target.removeprefix(f"{owner}.")
    return "linear"


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = operator.attrgetter(part)(root)
    root.add_module(leaf, module)


def module_slices(module: nn.Module) -> dict[str, Slice]:
    """The slices of a result of :func:`put_back`."""
    found: dict[str, Slice] = getattr(module, "meta", {}).get("slices", {})
    return found


__all__ = ["BorrowedBasis", "linears_side_by_side", "module_slices", "put_back"]
