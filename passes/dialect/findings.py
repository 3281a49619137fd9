"""What is wrong with something in a graph: words for what was found, None where nothing is.

Legend for shapes: I input features, O output features, R rank, T inputs that a pivoted basis
did not keep.
"""

from __future__ import annotations

import operator
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.dialect.view import View, sizes_of
from passes.graph.graph import attribute, weight_and_bias
from passes.graph.modes import crossing
from passes.graph.slices import Slice, gather_order
from passes.graph.writes import is_in_place

OPERATIONS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_INTEGERS = (torch.int32, torch.int64)
_BEFORE = ("placeholder", "get_attr", "root")  # torch.export reads stored tensors first
_GROUPED = (torch.unflatten, torch.add)


def not_an_operation(view: View, node: fx.Node) -> str | None:
    """An opcode that is none of fx's."""
    return None if node.op in OPERATIONS else repr(node.op)


def no_target(view: View, node: fx.Node) -> str | None:
    """A target that is not there, or of the wrong kind for the opcode."""
    target = str(node.target)
    if node.op == "call_module" and view.module(target) is None:
        return f"no module {target!r}"
    if node.op == "call_function" and not callable(node.target):
        return f"the function {target!r}"
    if node.op == "call_method" and not target.isidentifier():
        return f"the method {target!r}"
    if node.op == "get_attr":
        try:
            attribute(view.gm, target)
        except AttributeError:
            return f"no attribute {target!r}"
    return None


def out_of_place(view: View, node: fx.Node) -> str | None:
    """An input after something else, or something after the output."""
    if node.op == "placeholder" and node.prev.op not in _BEFORE:
        return f"an input after {node.prev.name!r}"
    if node.op == "output" and node.next.op != "root":
        return f"{node.next.name!r} after the output"
    return None


def not_linear(view: View, call: tuple[fx.Node, nn.Module]) -> str | None:
    """A linear that is not called with one input, or whose tensors do not fit."""
    node, module = call
    given = [*node.args, *node.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], fx.Node):
        return f"the arguments {given}"
    weight_OI, bias_O = weight_and_bias(module)
    if weight_OI.ndim != 2:
        return f"a weight {tuple(weight_OI.shape)}"
    if bias_O is not None and bias_O.shape != weight_OI.shape[:1]:
        return f"a weight {tuple(weight_OI.shape)} and a bias {tuple(bias_O.shape)}"
    width = view.width(given[0])
    if width is not None and width != weight_OI.shape[1]:
        return f"an input of {width} features and a weight {tuple(weight_OI.shape)}"
    return None


def other_modes(view: View, read: tuple[fx.Node, fx.Node]) -> str | None:
    """A linear that reads what was computed in other modes as it is: a pass that merges products
    of one input would take one with gradients for one without."""
    node, source = read
    if source.op == "get_attr" or source.target is crossing:
        return None
    if view.modes[source] == view.modes[node]:
        return None
    return f"the input {source.name!r}, computed in other modes (gradients, autocast)"


def modes_left(view: View, node: fx.Node) -> str | None:
    """An output in other modes than the caller's, which would go on after the call."""
    return None if view.modes[node] is None else f"the modes {view.modes[node]} at the output"


def is_there(view: View, what: str) -> str | None:
    """What may not be there at all."""
    return what


def no_owner(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice of a linear that is not there."""
    module = named[1].module
    return f"no weight at {module!r}" if view.weight(module) is None else None


def no_partition(view: View, module: str) -> str | None:
    """Slices that overlap, leave rows out, or lie outside."""
    weight_OI = view.weight(module)
    there = [place for name, place in view.owners[module] if name not in view.empty]
    rows = [(place.start, place.stop) for place in there]
    return None if weight_OI is None else _gap(rows, len(weight_OI))


def _gap(rows: list[tuple[int, int]], height: int) -> str | None:
    at = 0
    for start, stop in sorted(rows):
        if start != at or stop <= start:
            return f"rows {start}:{stop} where row {at} of {height} is next"
        at = stop
    return None if at == height else f"{at} rows of {height}"


def other_units(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice that has other hidden units than are recorded, or than others of the same MLP."""
    _, place = named
    weight_OI = view.weight(place.module)
    for units, rows in ((place.unit_rows, True), (place.unit_columns, False)):
        if units is None or weight_OI is None:
            continue
        if any(low >= high for low, high in pairwise((-1, *units.kept, units.of))):
            return f"units {units.kept[:8]} of {units.of}, not ascending or not in range"
        size = place.stop - place.start if rows else weight_OI.shape[1]
        if size != units.size:
            runs = units.parts * units.each
            return f"{size} where {runs} times {units.size // runs} are recorded"
        if (units.of, units.kept) != view.units[units.name]:
            return f"other units than the first slice of {units.name!r}"
    return None


def not_looked_up(view: View, module: str) -> str | None:
    """A holder of slices which is no ``nn.Linear``, although its rows are not just looked up."""
    return _foreign(view, module, (F.embedding,))


def not_grouped(view: View, module: str) -> str | None:
    """As :func:`not_looked_up`, where a batched product may read the weight too."""
    return _foreign(view, module, (F.embedding, *_GROUPED))


def _foreign(view: View, module: str, reading: tuple[object, ...]) -> str | None:
    found = view.module(module)
    for node in view.readers.get(module, []):
        if node.op == "call_module" and not isinstance(found, nn.Linear):
            return f"a call of {type(found).__name__}"
        for user in node.users if node.op == "get_attr" else ():
            if user.target not in reading:
                return f"a tensor that node {user.name!r} reads"
    return None


def shares(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice that has a basis, or the order of one."""
    _, place = named
    if place.basis or place.pivoted or place.folded or place.basis_rows:
        return str(place)
    return None


def not_its_own(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice in a linear of another name."""
    name, place = named
    # the graph of one linear by itself knows its slices by the whole model's names
    own = place.module in (name, "linear") or name.endswith(f".{place.module}")
    return None if own else f"rows {place.start}:{place.stop} of {place.module!r}"


def not_rejoined(view: View, parts: list[fx.Node]) -> str | None:
    """A ``cat`` with some rows of a weight that one input is multiplied by, but not with all in
    their order."""
    names = [str(part.target) if part.op == "call_module" else part.name for part in parts]
    cut = next((view.cut[name] for name in names if name in view.cut), [])
    inputs = {part.args[0] for part in parts if str(part.target) in cut}
    if len(inputs) != 1:  # the model puts together what it made of several
        return None
    (x,) = inputs
    wanted = [name for name in cut if any(node.args[:1] == (x,) for node in view.readers[name])]
    return None if names == wanted else f"{names}, not {wanted}"


def not_at_the_root(view: View, basis: str) -> str | None:
    """A basis that is not a linear without bias at the root, with no other owner."""
    weight_RT, module = view.weight(basis), view.module(basis)
    if weight_RT is None or module is None:
        return "no such linear"
    if "." in basis:
        return f"a module of {basis.rpartition('.')[0]!r}"
    if weight_and_bias(module)[1] is not None:
        return "a bias"
    names = view.parameters.get(id(weight_RT), [])  # one that is borrowed has no name here
    return None if names in ([], [f"{basis}.weight"]) else f"the owners {names}"


def other_rank(view: View, named: tuple[str, Slice]) -> str | None:
    """A coefficient with more or fewer columns than its basis has rows."""
    _, place = named
    if place.basis is None:
        return None
    basis_RT, coefficient_OR = view.weight(place.basis), view.weight(place.module)
    if basis_RT is None or coefficient_OR is None:
        return None
    start, stop = place.basis_rows or (0, len(basis_RT))
    if not 0 <= start < stop <= len(basis_RT):
        return f"rows {start}:{stop} of a basis of rank {len(basis_RT)}"
    columns = coefficient_OR.shape[1]
    return None if columns == stop - start else f"{columns} columns for a rank of {stop - start}"


def stacked(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice whose basis is a part of a stack."""
    rows = named[1].basis_rows
    return None if rows is None else f"rows {rows[0]}:{rows[1]} of basis {named[1].basis!r}"


def no_coefficient(view: View, read: tuple[str, fx.Node, tuple[int, int]]) -> str | None:
    """A reader of a basis product which is no coefficient of those rows."""
    basis, node, (start, stop) = read
    # a batched product has a rule of its own, and passes let alone what is written into
    if node.target is torch.unflatten or (node.op != "call_module" and is_in_place(node)):
        return None
    held = view.owners.get(str(node.target), []) if node.op == "call_module" else []
    recorded = {_read(view, place) for _, place in held}
    here = (basis, start, stop)
    if recorded and recorded <= {here, *view.places.get(here, ())}:
        return None
    return f"rows {start}:{stop} of basis {basis!r}, recorded with {recorded or 'none'}"


def _read(view: View, place: Slice) -> tuple[str, int, int] | None:
    if place.basis is None:
        return None
    weight_RT = view.weight(place.basis)
    rank = 0 if weight_RT is None else len(weight_RT)
    return (place.basis, *(place.basis_rows or (0, rank)))


def no_lookup(view: View, read: tuple[str, fx.Node]) -> str | None:
    """A reader of a basis' weight which does not multiply rows of a coefficient by it."""
    basis, node = read
    rows = node.args[0] if node.target is torch.matmul else None
    if isinstance(rows, fx.Node) and rows.target is F.embedding:
        weight = rows.args[1]
        held = str(weight.target).removesuffix(".weight") if isinstance(weight, fx.Node) else ""
        if held in view.bases[basis]:
            return None
    return f"{node.op} {node.name!r} on the weight of basis {basis!r}"


def not_kept(view: View, basis: str) -> str | None:
    """Kept inputs of a basis that are no ascending distinct numbers in range."""
    module, weight_RT = view.module(basis), view.weight(basis)
    kept = getattr(module, "kept", None)
    if basis not in view.pivoted:
        return None if kept is None else "a buffer 'kept' of a basis that is recorded as whole"
    if weight_RT is None:
        return None
    rank, features = len(weight_RT), sum(weight_RT.shape)
    if not isinstance(kept, Tensor) or kept.is_floating_point() or kept.shape != (rank,):
        shape = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
        return f"{shape} for a rank of {rank}"
    if kept.device.type == "meta":
        return None
    numbers = kept.tolist()
    if any(low >= high for low, high in pairwise(numbers)):
        return f"{numbers[:8]}, not ascending"
    wrong = [number for number in numbers if not 0 <= number < features]
    return f"input {wrong[0]} of {features}" if wrong else None


def mixed(view: View, basis: str) -> str | None:
    """A basis that some slices take for pivoted and some do not."""
    places = [(name, place) for name, place in view.slices.items() if place.basis == basis]
    odd = [name for name, place in places if place.pivoted != (basis in view.pivoted)]
    return f"the slice {odd[0]!r}, recorded as whole" if odd else None


def no_order(view: View, named: tuple[str, Slice]) -> str | None:
    """A slice in the order of a basis that has none."""
    basis = named[1].folded
    if basis is None or isinstance(getattr(view.module(basis), "kept", None), Tensor):
        return None
    return f"the order of {basis!r}, which is no pivoted basis of this graph"


def other_pieces(view: View, call: tuple[str, fx.Node]) -> str | None:
    """A call of a pivoted basis without the two pieces of its input, kept and rest."""
    basis, node = call
    weight_RT = view.weight(basis)
    rest = node.args[0]
    if not isinstance(rest, fx.Node) or rest.target is not operator.getitem or weight_RT is None:
        return f"the whole input {rest}"
    split, at = rest.args
    sizes = sizes_of(split)
    if sizes is None or not isinstance(at, int) or sizes[at - 1 : at + 1] != [*weight_RT.shape]:
        return f"piece {at} of {sizes} for a table {tuple(weight_RT.shape)}"
    for user in node.users:
        kept = user.args[0]
        if (
            user.target is not torch.add
            or not isinstance(kept, fx.Node)
            or kept.args != (split, at - 1)
        ):
            return f"{user.name!r}, which does not add the kept inputs"
    return None


def wrong_index(view: View, name: str) -> str | None:
    """An index that is not the order of its bases, or that would be saved."""
    path, _, leaf = name.rpartition(".")
    holder = view.module(path) if path else view.gm
    index = getattr(holder, leaf, None)
    if holder is None or not isinstance(index, Tensor) or index.dtype not in _INTEGERS:
        return f"{None if index is None else type(index).__name__}"
    if leaf not in holder._non_persistent_buffers_set:
        return "a buffer that is part of the state"
    for basis in view.gathers[name]:
        if not isinstance(getattr(view.module(basis), "kept", None), Tensor):
            return f"the order of {basis!r}, which is no pivoted basis of this graph"
    orders = [gather_order(view.gm, basis) for basis in view.gathers[name]]
    known = [order for order in orders if order is not None]
    if len(known) < len(orders) or index.device.type == "meta":
        return None
    same = torch.equal(torch.cat(known).to(index), index)
    return None if same else f"another order than that of {view.gathers[name]}"


def other_sizes(view: View, node: fx.Node) -> str | None:
    """Pieces that do not add up to what is split, or a part that reaches beyond it."""
    width, sizes = view.width(node.args[0]), sizes_of(node)
    if width is None:
        return None
    if sizes is not None:
        return None if sum(sizes) == width else f"{sizes} of {width}"
    _, dim, start, length = node.args
    if dim != -1 or not isinstance(start, int) or not isinstance(length, int):
        return None
    return None if 0 <= start <= start + length <= width else f"{start}+{length} of {width}"


def other_batch(view: View, product: tuple[fx.Node, fx.Node, fx.Node]) -> str | None:
    """A batched product whose views do not fit its weight and its input."""
    z_nR, weight_nOR, stored = product
    weight = attribute(view.gm, str(stored.target))
    of_z, of_weight = z_nR.args[-1], weight_nOR.args[-1]
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return "no weight"
    if not (isinstance(of_z, (tuple, list)) and isinstance(of_weight, (tuple, list))):
        return "no views"
    (count, rank), (again, height) = of_z, of_weight
    if not (isinstance(count, int) and isinstance(rank, int) and isinstance(height, int)):
        return f"the views {of_z} and {of_weight}"
    width = view.width(z_nR.args[0])
    fits = count == again and (count * height, rank) == tuple(weight.shape)
    if fits and width in (None, count * rank):
        return None
    return f"{of_z} of {width} and {of_weight} of a weight {tuple(weight.shape)}"


def no_rows(view: View, name: str) -> str | None:
    """An origin that points at rows which are not there."""
    origin = view.origins[name]
    for module, start, stop in ((origin.module, origin.start, origin.stop), *origin.copies):
        weight_OI = view.weight(module)
        if weight_OI is None:
            return f"no linear {module!r}"
        there = start == stop if name in view.empty else start < stop
        if not (there and 0 <= start <= stop <= len(weight_OI)):
            return f"rows {start}:{stop} of {len(weight_OI)}"
    return None


def left_over(view: View, name: str) -> str | None:
    """A linear that is still there beside the one which holds its rows now."""
    origin = view.origins[name]
    places = {origin.module, *(module for module, _, _ in origin.copies)}
    if name in places or not isinstance(view.module(name), nn.Linear):
        return None
    return f"{name!r} beside {origin.module!r}, which holds its rows"


def no_origin(view: View, module: str) -> str | None:
    """A packed linear of which some rows came from nowhere."""
    weight_OI = view.weight(module)
    if weight_OI is None:
        return "no linear"
    rows = []
    for linear, origin in view.origins.items():
        places = ((origin.module, origin.start, origin.stop), *origin.copies)
        if linear not in view.empty:
            rows += [(start, stop) for name, start, stop in places if name == module]
    return _gap(rows, len(weight_OI))
