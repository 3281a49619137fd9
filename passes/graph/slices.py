"""Where the slices of the original weights are now.

Names outlive nodes and modules: ``transformer.h.0.attn.c_attn.q.3`` names the rows of head 3 of q
before any rewriting, after splitting, and after its coefficient was fused with its neighbours'.
Every pass that moves a slice writes its new place into ``gm.meta["slices"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from passes.errors import PassError
from passes.graph.graph import weight_and_bias

_KEY = "slices"


@dataclass(frozen=True)
class KeptUnits:
    """Which of some hidden units are there (:class:`passes.SelectUnits`): ``kept`` of ``of``,
    ascending, in each of ``parts`` runs of rows or columns, ``each`` neighbours for every one.
    Where ``span`` is given, the rows are of those from the first number to before the second."""

    name: str
    of: int
    kept: tuple[int, ...] = field(repr=False)
    parts: int = 1
    each: int = 1
    span: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """How many rows or columns are there."""
        return self.parts * len(self._own) * self.each

    @property
    def whole_size(self) -> int:
        """How many there were."""
        first, stop = self.span or (0, self.of)
        return self.parts * (stop - first) * self.each

    @property
    def _own(self) -> tuple[int, ...]:
        first, stop = self.span or (0, self.of)
        return tuple(unit - first for unit in self.kept if first <= unit < stop)

    def places(self) -> Tensor:
        """The rows or columns that are there, in order."""
        kept, run = torch.tensor(self._own, dtype=torch.int64), self.whole_size // self.parts
        units = kept[:, None] * self.each + torch.arange(self.each)
        return torch.cat([part * run + units.flatten() for part in range(self.parts)])

    def whole(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensor with zeros where units are not there."""
        shape = list(tensor.shape)
        shape[dim] = self.whole_size
        return tensor.new_zeros(shape).index_copy(dim, self.places().to(tensor.device), tensor)


@dataclass(frozen=True)
class Slice:
    """Rows ``start:stop`` of the linear ``module`` compute one slice; with ``basis`` set, that
    linear is a coefficient and reads the product of the basis module of that name; ``pivoted``
    says that the basis is stored as kept inputs and a table (:class:`passes.PivotBasis`)."""

    module: str
    start: int
    stop: int
    basis: str | None = None
    pivoted: bool = False
    folded: str | None = None
    """The basis in whose order of inputs (kept, then the others) this slice's rows are."""
    basis_rows: tuple[int, int] | None = None
    """The rows of the basis module that are this slice's, where several bases are stacked in it."""
    unit_rows: KeptUnits | None = None
    """Its rows are hidden units, of which these are there."""
    unit_columns: KeptUnits | None = None
    """It reads hidden units, of which these are there."""

    def whole_weight(self, rows: Tensor) -> Tensor:
        """A weight that stands for the slice, from its rows as they are stored (whole of their
        basis): zeros in the place of units that are not there."""
        if self.unit_columns is not None:
            rows = self.unit_columns.whole(rows, 1)
        return rows if self.unit_rows is None else self.unit_rows.whole(rows, 0)

    def whole_bias(self, rows: Tensor) -> Tensor:
        """As :meth:`whole_weight`, of a bias."""
        return rows if self.unit_rows is None else self.unit_rows.whole(rows, 0)


def slices(gm: fx.GraphModule) -> Mapping[str, Slice]:
    """Every slice by its name, in the order in which they were split."""
    found: Mapping[str, Slice] = gm.meta.get(_KEY, {})
    return found


def set_slices(gm: fx.GraphModule, places: Mapping[str, Slice]) -> None:
    """Record new places; a fresh mapping, because copies of a graph share their ``meta`` values."""
    gm.meta[_KEY] = {**slices(gm), **places}


def slice_weight(gm: fx.GraphModule, name: str) -> Tensor:
    """The weight ``(out, in)`` that the slice stands for: a view, or ``coefficient @ basis``.

    Raises :class:`PassError` when there is no such slice.
    """
    place = slices(gm).get(name)
    if place is None:
        known = ", ".join(list(slices(gm))[:4])
        raise PassError(f"no slice named {name!r}; the graph has {known or 'none'}, ...")
    weight_OI, _ = weight_and_bias(gm.get_submodule(place.module))
    rows = rows_of(gm, place, weight_OI)
    if place.basis is None:
        return place.whole_weight(rows)
    return torch.matmul(rows, basis_of(gm, place))


def rows_of(gm: nn.Module, place: Slice, tensor: Tensor) -> Tensor:
    """A slice's rows of its module's weight or bias, in their original order."""
    rows = tensor[place.start : place.stop]
    order = None if place.folded is None else gather_order(gm, place.folded)
    return rows if order is None else rows.index_select(0, order.argsort().to(rows.device))


def gather_order(gm: nn.Module, basis: str) -> Tensor | None:
    """The inputs of a pivoted basis in the order in which it reads them: the kept ones ascending,
    then the others; None while its ``kept`` buffer has no values yet (meta device)."""
    module = gm.get_submodule(basis)
    kept = module.kept
    assert isinstance(kept, Tensor)
    if kept.device.type == "meta":
        return None
    weight_RT, _ = weight_and_bias(module)
    others = torch.ones(sum(weight_RT.shape), dtype=torch.bool, device=kept.device)
    others[kept.long()] = False
    return torch.cat([kept.long(), others.nonzero().flatten()])


def basis_of(gm: nn.Module, place: Slice, dtype: torch.dtype | None = None) -> Tensor:
    """The basis ``(R, I)`` that the slice's coefficient reads the product of; in a dtype, or its
    own."""
    assert place.basis is not None
    basis_RI = basis_matrix(gm, place.basis, pivoted=place.pivoted, dtype=dtype)
    return basis_RI if place.basis_rows is None else basis_RI[slice(*place.basis_rows)]


def basis_matrix(
    gm: nn.Module, name: str, *, pivoted: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """The basis ``(R, I)`` of a module, whether it is stored whole or pivoted; in a dtype that is
    finer than its own, which the values of codes may need."""
    module = gm.get_submodule(name)
    weight_RT, _ = weight_and_bias(module)
    weight_RT = weight_RT if dtype is None else weight_RT.to(dtype)
    if not pivoted:
        return weight_RT
    order = gather_order(gm, name)
    assert order is not None
    whole = torch.eye(len(weight_RT), dtype=weight_RT.dtype, device=weight_RT.device)
    return torch.cat([whole, weight_RT], 1).index_select(1, order.argsort())
