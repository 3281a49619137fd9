"""How a stack of matrices, one for each expert, reaches the nodes that multiply by it.

A stack is a parameter of three dimensions. A model may gather a matrix for each row
(``w[experts]``, then ``bmm``), multiply all of them at once (``bmm(x, w)``, ``einsum``), take them
one by one (``F.linear(x, w[3])``), or hand the stack to a product of runs of rows (``grouped_mm``).
What stands between, a transpose or a cast to the dtype that it has, is looked through.

Legend for shapes: E experts, O output features, I input features, S pairs of a token and an expert.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from passes.graph.contractions import contraction
from passes.graph.cuts import Bounds, cut_of
from passes.graph.forms import Batched, Form, Grouped, One, Routed, Stack
from passes.graph.graph import attribute, multiplication
from passes.graph.operands import swaps_last
from passes.graph.writes import is_written

_aten = torch.ops.aten
_BMM = (torch.bmm, _aten.bmm.default, "bmm")
_BADDBMM = (torch.baddbmm, _aten.baddbmm.default, "baddbmm")
_MATMUL = (torch.matmul, operator.matmul, _aten.matmul.default, "matmul", "__matmul__")
_EINSUM = (torch.einsum, torch.functional.einsum, _aten.einsum.default)
_GROUPED = (
    torch._grouped_mm,
    torch.nn.functional.grouped_mm,
    _aten._grouped_mm.default,
)
# an operation of transformers for what torch's own cannot do
_GROUPED_NAME = "transformers.grouped_mm_fallback"
_SELECT = (torch.select, _aten.select.int, "select")
_INDEX_SELECT = (torch.index_select, _aten.index_select.default, "index_select")
_UNBIND = (torch.unbind, _aten.unbind.int, "unbind")
_CHUNK = (torch.chunk, _aten.chunk.default, "chunk", torch.tensor_split, "tensor_split")
_SPLIT = (torch.split, torch.functional.split, _aten.split.Tensor, "split")
_SQUEEZE = (torch.squeeze, _aten.squeeze.dim, "squeeze")
_UNSQUEEZE = (torch.unsqueeze, _aten.unsqueeze.default, "unsqueeze")
_ADD_IN_PLACE = ("add_", _aten.add_.Tensor)
_CAST = ("to", _aten.to.dtype, _aten._to_copy.default, "contiguous", _aten.contiguous.default)
_SIZE = ("size",)
# torch.export's claim about the dtype and the device of what it traced
_CLAIM = _aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class _View:
    """What a node holds of a stack: all of it, one matrix (``kept``: as a stack of one), a tuple of
    either, or the matrices that ``experts`` gathers; ``swapped`` says that it is transposed."""

    node: fx.Node
    kind: Literal["stack", "one", "gathered"] = "stack"
    swapped: bool = False
    number: int | None = None
    kept: bool = False
    parts: bool = False
    experts: fx.Node | None = None
    cut: int | None = None
    """The dimension of the stored stack of which only ``bounds`` are held, or a tuple of them."""
    bounds: Bounds = ()


def stacks(gm: fx.GraphModule) -> Mapping[str, tuple[Stack, ...]]:
    """The stacks of experts whose every reader is such a product, by the parameter's name."""
    found: dict[str, list[Stack | None]] = {}
    shapes: dict[str, torch.Size] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        value = attribute(gm, name)
        if isinstance(value, nn.Parameter) and value.ndim == 3:
            shapes[name] = value.shape
            found.setdefault(name, []).extend(_reads(_View(node), value))
    known = {name: [one for one in reads if one is not None] for name, reads in found.items()}
    return {
        name: tuple(reads)
        for name, reads in known.items()
        if reads and len(reads) == len(found[name]) and _apart(reads, shapes[name])
    }


def _apart(reads: list[Stack], shape: Sequence[int]) -> bool:
    """Whether no product multiplies the stack by itself, and those of some outputs stand beside
    products of the same input that make them whole."""
    pieces: dict[object, list[tuple[int, int]]] = {}
    for one in reads:
        if one.rows is not None:
            number = one.form.number if isinstance(one.form, One) else None
            pieces.setdefault((input_of(one.input), number), []).append(one.rows)
            if is_written(one.input):
                return False
    whole = shape[2 if reads[0].transposed else 1]
    for found in pieces.values():
        found.sort()
        ends = [0, *(stop for _, stop in found)]
        if [start for start, _ in found] != ends[:-1] or ends[-1] != whole:
            return False
    return len({one.result for one in reads}) == len(reads)


def input_of(node: fx.Node) -> object:
    """Equal for nodes that take the same part of one node."""
    if node.target is operator.getitem or _is(node, _SELECT):
        return node.target, str(node.args)
    return node


def ndim_of(node: fx.Node) -> int | None:
    """The number of dimensions of a node's value, as capture noted it."""
    value = node.meta.get("val")
    known = node.meta.get("ndim", getattr(value, "ndim", None))
    return known if isinstance(known, int) else None


def shape_reads(weight: fx.Node) -> list[fx.Node]:
    """The nodes that read the size of a stored tensor: constants, since it keeps it."""
    return [user for user in weight.users if _is(user, _SIZE) and not user.kwargs]


def _reads(view: _View, stored: Tensor) -> Iterator[Stack | None]:
    """The products with what a view holds; None for another reader."""
    shapes = shape_reads(view.node) if view.node.op == "get_attr" else []
    for user in view.node.users:
        if user in shapes or user.target is _CLAIM:
            continue
        further = _step(view, user, stored)
        if further is not None:
            yield from _reads(further, stored)
        elif view.parts or view.kept or view.node in _shared(user):
            yield None
        else:
            yield _PRODUCTS[view.kind](view, user)


def _shared(user: fx.Node) -> list[fx.Node]:
    """Operands that a node reads more than once."""
    flat: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), flat.append)
    return [node for node in flat if flat.count(node) > 1]


def _step(view: _View, user: fx.Node, stored: Tensor) -> _View | None:
    """What a node that passes a view on holds; None where it does something else."""
    if view.parts:
        number = user.args[1] if user.target is operator.getitem else None
        if not isinstance(number, int):
            return None
        if view.bounds:
            bounds = view.bounds[number : number + 1 or None]
            return replace(view, node=user, parts=False, bounds=bounds)
        number %= len(stored)
        return replace(view, node=user, kind="one", number=number, parts=False)
    if view.kept:
        return replace(view, node=user, kept=False) if _first_of(user) else None
    if swaps_last(user, 2 if view.kind == "one" else 3):
        return replace(view, node=user, swapped=not view.swapped)
    if _is(user, _CAST) and all(_is_dtype(a, stored.dtype) for a in _arguments(user)):
        return replace(view, node=user)
    taken = _taken(view, user, len(stored)) if view.kind == "stack" else None
    return taken or _cut(view, user, stored)


def _cut(view: _View, user: fx.Node, stored: Tensor) -> _View | None:
    shape = stored.mT.shape if view.swapped else stored.shape
    found = None if view.bounds else cut_of(user, shape[1:] if view.kind == "one" else shape)
    if found is None:
        return None
    dim, bounds, parts = found
    cut = 3 + (-3 - dim if view.swapped else dim)
    return replace(view, node=user, cut=cut, bounds=bounds, parts=parts)


def _taken(view: _View, user: fx.Node, count: int) -> _View | None:
    """The part of a whole stack that a node takes."""
    if _is(user, _UNBIND) and _arguments(user) in ((), (0,)):
        return replace(view, node=user, parts=True)
    if (_is(user, _CHUNK) and _arguments(user) in ((count,), (count, 0))) or (
        _is(user, _SPLIT) and _arguments(user) in ((1,), (1, 0))
    ):
        return replace(view, node=user, parts=True, kept=True)
    index = _index(user)
    if isinstance(index, fx.Node):
        return replace(view, node=user, kind="gathered", experts=index)
    if isinstance(index, int) and -count <= index < count:
        return replace(view, node=user, kind="one", number=index % count)
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        if not all(b is None or isinstance(b, int) for b in bounds):
            return None
        start, stop, step = index.indices(count)
        if (stop - start, step) == (1, 1):
            return replace(view, node=user, kind="one", number=start, kept=True)
    return None


def _index(node: fx.Node) -> object:
    """What a node takes of the first dimension: an int, a slice, or the node of indices."""
    if _is(node, _SELECT) and len(node.args) == 3 and node.args[1] == 0:
        return node.args[2] if isinstance(node.args[2], int) else None
    if _is(node, _INDEX_SELECT) and len(node.args) == 3 and node.args[1] == 0:
        return node.args[2] if isinstance(node.args[2], fx.Node) else None
    if node.target is _aten.slice.Tensor:
        of = _arguments(node)
        return slice(*of[1:]) if of[:1] == (0,) and len(of) == 3 else None
    if node.target not in (operator.getitem, _aten.index.Tensor):
        return None
    index: Any = node.args[1]
    if isinstance(index, (tuple, list)):
        if not index or any(rest != slice(None) for rest in index[1:]):
            return None
        index = index[0]
    if isinstance(index, fx.Node) and ndim_of(index) not in (1, None):
        return None
    return index


def _is_dtype(argument: object, dtype: torch.dtype) -> bool:
    """Whether an argument is that dtype, be it one that follows a cast of the module."""
    if isinstance(argument, fx.Node) and argument.op == "call_module":
        module = argument.graph.owning_module
        assert module is not None, "the graph belongs to no module"
        switch = module.get_submodule(str(argument.target))
        like = getattr(switch, "like", None)
        # fxshare's, which this package does not import
        is_plain = type(switch).__name__ == "DtypeSwitch" and getattr(switch, "field", "") is None
        return is_plain and isinstance(like, Tensor) and like.dtype == dtype
    return argument == dtype


def _first_of(node: fx.Node) -> bool:
    return (_is(node, _SQUEEZE) and _arguments(node) == (0,)) or _index(node) == 0


def _one(view: _View, user: fx.Node) -> Stack | None:
    found = multiplication(user)
    if found is None or view.number is None:
        return None
    x, weight, bias, by_rows = found[:4]
    if weight is not view.node or not isinstance(x, fx.Node):
        return None
    if not (bias is None or isinstance(bias, fx.Node)):
        return None
    return _stack(view, x, user, One(view.number, bias), transposed=by_rows is view.swapped)


def _batched(view: _View, user: fx.Node) -> Stack | None:
    ends = _ends(view, user)
    if ends is not None:
        x = user.args[0]
        assert isinstance(x, fx.Node)
        return _stack(view, x, user, Grouped(ends), transposed=not view.swapped)
    shift: object = None
    operands = _arguments(user, whole=True)
    if _is(user, _BADDBMM) and len(operands) == 3:
        shift, operands = operands[0], operands[1:]
    is_einsum = _is(user, _EINSUM)
    plain = _is(user, (*_BMM, *_MATMUL, *_BADDBMM))
    if not (shift is None or isinstance(shift, fx.Node)):
        return None
    if is_einsum:
        found = contraction(user, view.node)
        if found is None:
            return None
        form = Batched(found.at, contraction=found)
        return _stack(view, found.input, user, form, found.transposed is not view.swapped)
    if not plain or len(operands) != 2:
        return None
    first, second = operands
    turned = first is view.node
    x = second if turned else first
    ndim = 3 if not _is(user, _MATMUL) else ndim_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(x, fx.Node) or ndim is None:
        return None
    spread = ndim if _is(user, _MATMUL) and ndim > 2 else None
    form = Batched(-3 if ndim > 2 else None, turned and ndim > 1, spread, shift=shift)
    return _stack(view, x, user, form, transposed=turned is view.swapped)


def _ends(view: _View, user: fx.Node) -> fx.Node | None:
    """The ends of the runs of a grouped product with the stack; None where it is none."""
    name = str(user.target).removesuffix(".default")
    if user.op != "call_function" or (user.target not in _GROUPED and name != _GROUPED_NAME):
        return None
    names = ("input", "weight", "offs")
    given = {**dict(zip(names, user.args, strict=False)), **user.kwargs}
    if len(user.args) > 3 or any(v is not None for k, v in given.items() if k not in names):
        return None
    x, ends = given.get("input", given.get("mat_a")), given.get("offs")
    if not user.args or user.args[0] is not x or given.get("weight") is not view.node:
        return None
    is_rows = isinstance(x, fx.Node) and ndim_of(x) == 2
    return ends if is_rows and isinstance(ends, fx.Node) else None


def _routed(view: _View, user: fx.Node) -> Stack | None:
    assert view.experts is not None
    if _is(user, _EINSUM):
        found = contraction(user, view.node)
        if found is None or found.at is None or found.total:
            return None
        form = Routed(view.experts, contraction=found)
        return _stack(view, found.input, user, form, found.transposed is not view.swapped)
    operands = _arguments(user, whole=True)
    if not _is(user, (*_BMM, *_MATMUL)) or len(operands) != 2:
        return None
    turned = operands[0] is view.node
    x = operands[1 if turned else 0]
    if not isinstance(x, fx.Node) or (_is(user, _MATMUL) and ndim_of(x) != 3):
        return None
    narrowed = _narrowed(view, user, x, 1 if not turned else -1)
    if narrowed is not None:
        return narrowed
    form = Routed(view.experts, turned, 3 if _is(user, _MATMUL) else None)
    return _stack(view, x, user, form, transposed=turned is view.swapped)


def _narrowed(view: _View, product: fx.Node, widened: fx.Node, at: int) -> Stack | None:
    """A routed product of rows ``(S, I)`` that were given a dimension of one and lose it again, so
    that the rows are what is read, and the bias of each is found."""
    users = list(product.users)
    if len(users) != 1 or not _is(widened, _UNSQUEEZE) or not _is(users[0], _SQUEEZE):
        return None
    (narrowed,) = users
    x = widened.args[0]
    if not (_arguments(widened) == _arguments(narrowed) == (at,)) or not isinstance(x, fx.Node):
        return None
    assert view.experts is not None
    stack = _stack(view, x, narrowed, Routed(view.experts), (at == -1) is view.swapped)
    if stack is None:
        return None
    for user in narrowed.users:
        biases = user.args[1] if _is(user, _ADD_IN_PLACE) and len(user.args) == 2 else None
        stored = biases.args[0] if isinstance(biases, fx.Node) and biases.args else None
        if (
            isinstance(biases, fx.Node)
            and isinstance(stored, fx.Node)
            and user.args[0] is narrowed
            and stored.target == f"{stack.parameter}_bias"
            and _index(biases) is view.experts
            and stack.rows is None
        ):
            return replace(stack, bias=str(stored.target), added=user)
    return stack


def _stack(view: _View, x: fx.Node, result: fx.Node, form: Form, transposed: bool) -> Stack | None:
    """The product; None where only some of its inputs are multiplied."""
    first = view.node
    while first.op != "get_attr":
        first = first.all_input_nodes[0]
    if view.cut == (1 if transposed else 2):
        return None
    rows = view.bounds[0] if view.bounds else None
    return Stack(str(first.target), transposed, x, result, form, rows=rows)


def _arguments(node: fx.Node, *, whole: bool = False) -> tuple[Any, ...]:
    """The arguments after the tensor, or with ``whole`` all; those by keyword in their order."""
    return (*(node.args if whole else node.args[1:]), *node.kwargs.values())


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


_PRODUCTS = {"stack": _batched, "one": _one, "gathered": _routed}
