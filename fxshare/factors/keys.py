"""Which part of the queries and keys of an attention to keep, what every width loses, and what
makes up for the rest.

The score of a query ``q = W_q x`` and a key ``k`` is ``qᵀ k``, whatever is left out of both:
keeping ``r`` numbers of a head is a ``U (r, d)`` for the keys and an ``X (r, d)`` for the queries,
and the scores are those of the query ``Uᵀ X q`` and the key as it was. So what is lost is priced as
the change of one weight, that of the queries: with the moments ``C = E[q qᵀ]`` and ``A = E[δ δᵀ]``
of the gradient δ at the queries, which is a sum of keys,

    ½ tr(A (1 − Uᵀ X) C (1 − Uᵀ X)ᵀ),     X = (U A Uᵀ)⁻¹ U A

for the best X, of all heads at once. That is the problem of the values and the output (``heads``)
with the two moments in each other's places; and where nothing turns queries and keys, the ``U`` of
every key is found as there. Rotary embeddings leave no choice but which numbers stay, the same in
all heads of a layer, since these share tables: pairs are chosen greedily, as hidden units are
(``units``), by what their elimination from A gains in C.

Published methods (arXiv 2408.09632) take the moment of the keys in the place of A, and leave the
queries that stay as they are: ``by_keys``. What is lost is priced with A all the same.

Biases are part of queries and keys: rows of the same matrices, which are turned or stay with them.

Shape suffixes: n numbers of all heads of queries, d width of a head, J those that stay, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxshare.base.numerics import relative_error
from fxshare.base.spent import part
from fxshare.errors import FactoriseError
from fxshare.factors.blocks import blocks_by_gain
from fxshare.factors.heads import Stored, own_blocks, turned_moment, turns_of, widths_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, UnitFactors, mixing_of
from fxshare.plans.keys import Keys
from passes import KeptUnits, NarrowedKeys

Groups = Sequence[Sequence[int]]


@dataclass(eq=False)
class KeyFactors(UnitFactors):
    """What carries an entry out: beside the queries' weights ``(heads in the slice * kept, I)`` the
    turn of every key, ``(kv heads, kept, d)``, where any may be; else numbers stay as they are."""

    turns: Tensor | None = None
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Of the queries, ``(heads in the slice * kept,)``."""

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight ``(rows, I)`` of queries for keys as they were: the same scores."""
        return self._unturned(name, self.weights[name]).to(dtype)

    def _unturned(self, name: str, rows: Tensor) -> Tensor:
        entry = self.entry
        assert isinstance(entry, Keys)
        by_head = rows.double().reshape(-1, entry.kept, *rows.shape[1:])
        if self.turns is None:
            found = by_head.new_zeros(len(by_head), entry.of, *by_head.shape[2:])
            found[:, list(self.kept)] = by_head
        else:
            before = sum(
                len(self.weights[one]) // entry.kept
                for one in entry.queries[: entry.queries.index(name)]
            )
            every = self.turns.repeat_interleave(entry.heads // entry.kv_heads, 0)
            turns = every[before : before + len(by_head)].to(by_head)
            found = torch.einsum("hkd,hk...->hd...", turns, by_head)
        return found.reshape(-1, *rows.shape[1:])

    def rows(self, first: int, rows: Tensor) -> Tensor:
        """The keys' weight or bias of some key heads from one on, as they are after."""
        entry = self.entry
        own = rows.double().reshape(-1, entry.of, *rows.shape[1:])
        if self.turns is None:
            found = own[:, list(self.kept)]
        else:
            turns = self.turns[first : first + len(own)].to(own)
            found = torch.einsum("hkd,hd...->hk...", turns, own)
        return found.reshape(-1, *rows.shape[1:])


@dataclass(frozen=True, eq=False)
class QueryMoments:
    """The moments of the queries of one attention, in float64: ``queries_nn`` is C, ``metric_nn``
    A, and ``keys_nn`` those of the keys that each query reads, where they are to choose by."""

    queries_nn: Tensor
    metric_nn: Tensor
    keys_nn: Tensor | None = None

    def lost(self, whole_nn: Tensor) -> float:
        """What the queries ``whole q`` lose."""
        gap_nn = torch.eye(len(whole_nn)).to(whole_nn) - whole_nn
        return 0.5 * float((self.metric_nn @ gap_nn @ self.queries_nn * gap_nn).sum())


@torch.no_grad()
def moments_of(
    queries: Sequence[SliceStatistics], keys: Sequence[SliceStatistics] = (), width: int = 1
) -> QueryMoments:
    """The moments of the queries of some slices, and of keys with heads of that width where they
    are given.

    Raises :class:`FactoriseError` for numbers that are not finite.
    """
    own_nn = diagonal(*(_second_moment(one, centred=False) for one in queries))
    metric_nn = diagonal(*(_metric(one) for one in queries))
    keys_nn = None
    if keys:
        of_keys = torch.cat(
            [own_blocks(_second_moment(x, centred=True), len(x.weight_OI) // width) for x in keys]
        )
        group = len(own_nn) // width // len(of_keys)
        keys_nn = diagonal(*of_keys.repeat_interleave(group, 0))
    total = own_nn.sum() + metric_nn.sum()
    if not bool(total.isfinite()):
        raise FactoriseError("queries and keys: expected finite moments, found NaN or infinity")
    return QueryMoments(own_nn, metric_nn, keys_nn)


def diagonal(*blocks: Tensor) -> Tensor:
    """Blocks on the diagonal of a matrix."""
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def _metric(one: SliceStatistics) -> Tensor:
    moment = one.moment_OO
    if moment is None:
        return torch.eye(len(one.weight_OI), dtype=torch.float64, device=one.weight_OI.device)
    return torch.diag(moment.double()) if moment.ndim == 1 else moment.double()


def _second_moment(one: SliceStatistics, *, centred: bool) -> Tensor:
    """``E[y yᵀ]`` ``(O, O)`` of what a slice computes; where the mean of its input is not kept, a
    bias counts by itself. The mean of keys adds the same to all scores of a query, which softmax
    does not see."""
    weight_OI = one.weight_OI.double()
    found_OO: Tensor = weight_OI @ one.gram_II @ weight_OI.T
    if not centred:
        mean_O = (
            torch.zeros(len(weight_OI)).to(weight_OI) if one.mean_I is None else (one.image_of_mean)
        )
        if one.bias_O is not None:
            mean_O = mean_O + one.bias_O.double()
        found_OO = found_OO + torch.outer(mean_O, mean_O)
    return (found_OO + found_OO.T) / 2


@part("keys")
@torch.no_grad()
def key_order(
    moments: QueryMoments,
    heads: int,
    kv_heads: int,
    groups: Groups | None,
    *,
    by_keys: bool = False,
) -> Order:
    """The numbers of a head by what they are worth, and what every width loses, in float64. Of a
    width that would part a group the loss is infinite. ``groups`` are None where any matrix may
    stand between queries and keys."""
    width = len(moments.queries_nn) // heads
    if groups is None and not by_keys:
        return widths_of(moments.metric_nn, moments.queries_nn, heads, kv_heads)
    numbers = torch.arange(width)
    lost = torch.full((width + 1,), torch.inf, dtype=torch.float64)
    lost[0] = 0.5 * float((moments.metric_nn * moments.queries_nn).sum())
    lost[width] = 0.0
    if groups is None:
        for kept in range(1, width):
            lost[kept] = moments.lost(_whole_of(moments, heads, kv_heads, kept, by_keys))
        return Order(numbers, lost)
    if by_keys:
        worth = _scores_of(moments, heads, groups)
        order = [groups[at] for at in worth.argsort(descending=True, stable=True).tolist()]
        for at in range(1, len(order)):
            kept_d = [number for group in order[:at] for number in group]
            gone = torch.ones(heads, width, dtype=torch.bool)
            gone[:, kept_d] = False
            there = gone.flatten().nonzero().flatten().to(moments.metric_nn.device)
            product = moments.metric_nn[there][:, there] * moments.queries_nn[there][:, there]
            lost[len(kept_d)] = 0.5 * float(product.sum())
        return Order(torch.tensor([n for group in order for n in group]), lost)
    by_head = torch.arange(heads)[:, None] * width
    blocks = [(by_head + torch.tensor(list(g))).flatten().tolist() for g in groups]
    places, gains = blocks_by_gain(moments.metric_nn, moments.queries_nn, blocks)
    order = [groups[at] for at in places]
    left, size = float(lost[0]), 0
    for group, gain in zip(order[:-1], gains, strict=False):
        left, size = left - 0.5 * gain, size + len(group)
        lost[size] = max(left, 0.0)
    return Order(torch.tensor([number for group in order for number in group]), lost)


def _scores_of(moments: QueryMoments, heads: int, groups: Groups) -> Tensor:
    """``Σ ‖C_p^½‖ ‖K_p^½‖`` of every group over the heads."""
    sizes = []
    assert moments.keys_nn is not None, "the moments of the keys were given"
    for moment in (moments.queries_nn, moments.keys_nn):
        by_head = moment.diagonal().reshape(heads, -1)
        sizes.append(torch.stack([by_head[:, list(g)].sum(1).clamp(min=0) for g in groups]).sqrt())
    return (sizes[0] * sizes[1]).sum(1)


def _whole_of(moments: QueryMoments, heads: int, kv_heads: int, kept: int, by_keys: bool) -> Tensor:
    """``Uᵀ X`` ``(n, n)`` of some width where any matrix may be."""
    turns, mixing = _turned(moments, heads, kv_heads, kept, by_keys)
    every = turns.repeat_interleave(heads // kv_heads, 0)
    whole: Tensor = diagonal(*every[:, :kept]).T @ mixing.T @ diagonal(*every)
    return whole


def _turned(
    moments: QueryMoments,
    heads: int,
    kv_heads: int,
    kept: int,
    by_keys: bool,
    relative_floor: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """The turns ``(kv heads, d, d)``, and ``Xᵀ`` ``(n, J)`` of the turned queries."""
    metric_nn = moments.keys_nn if by_keys else moments.metric_nn
    assert metric_nn is not None, "the moments of the keys were given"
    turns = turns_of(metric_nn, moments.queries_nn, heads, kv_heads)
    turned_nn = turned_moment(metric_nn, turns, heads)
    there = torch.arange(len(metric_nn)).reshape(heads, -1)[:, :kept].flatten()
    return turns, mixing_of(turned_nn, tuple(there.tolist()), relative_floor)


@part("keys")
@torch.no_grad()
def key_factors(
    entry: Keys,
    queries: Mapping[str, SliceStatistics],
    moments: QueryMoments,
    order: Order,
    *,
    by_keys: bool = False,
    relative_floor: float = 1e-8,
) -> KeyFactors:
    """What carries an entry out. All of the width kept is the identity, whatever the moments
    are."""
    width, heads, kept = entry.of, entry.heads, entry.kept
    made = KeyFactors(
        entry,
        order.kept(kept),
        {name: one.weight_OI.double() for name, one in queries.items()},
        lost=float(order.lost[kept]),
        total=float(order.lost[0]),
        biases={n: x.bias_O.double() for n, x in queries.items() if x.bias_O is not None},
    )
    if kept == width:
        return made
    if entry.rotary == "none":
        how = by_keys, relative_floor
        turns, mixing_nJ = _turned(moments, heads, entry.kv_heads, kept, *how)
        every = diagonal(*turns.repeat_interleave(heads // entry.kv_heads, 0))
        made.turns, made.kept = turns[:, :kept], tuple(range(kept))
        combined_Jn = mixing_nJ.T @ every
    else:
        numbers = torch.arange(heads * width).reshape(heads, width)
        there = tuple(numbers[:, list(made.kept)].flatten().tolist())
        if by_keys:
            eye = torch.eye(heads * width, dtype=torch.float64)
            combined_Jn = eye[list(there)].to(moments.metric_nn.device)
        else:
            combined_Jn = mixing_of(moments.metric_nn, there, relative_floor).T
    first = 0
    for name, one in queries.items():
        # queries of one slice make up for those of that slice alone
        rows, stop = len(one.weight_OI), first + len(one.weight_OI)
        heads_before = first // width * kept
        own = combined_Jn[heads_before : heads_before + rows // width * kept, first:stop]
        made.weights[name] = own @ one.weight_OI.double()
        if one.bias_O is not None:
            made.biases[name] = own @ one.bias_O.double()
            shift = made._unturned(name, made.biases[name]) - one.bias_O.double()
            made.bias_shift[name] = shift
        first = stop
    return made


def stored_keys(
    made: KeyFactors, rows: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> Stored:
    """The tensors of an entry in the model's dtype. ``rows`` are the dense weights by slice, and
    ``biases`` those of the slices whose site has one."""
    entry = made.entry
    assert isinstance(entry, Keys)
    queries = {name: made.weights[name].to(rows[name].dtype) for name in entry.queries}
    moved = {name: made.biases[name].to(rows[name].dtype) for name in made.biases}
    keys, first = {}, 0
    for name in entry.keys:
        dtype = rows[name].dtype
        keys[name] = made.rows(first, rows[name]).to(dtype)
        if name in biases:
            moved[name] = made.rows(first, biases[name]).to(dtype)
        first += len(rows[name]) // entry.of
    one = NarrowedKeys(entry.name, made.kept, entry.of, queries, keys, moved)
    errors, shifts = {}, {}
    for name, weight in one.weights.items():
        kept = KeptUnits(entry.name, entry.of, made.kept, len(weight) // entry.kept)
        errors[name] = relative_error(rows[name], kept.whole(weight, 0).double())
        if name in moved:
            gap = kept.whole(moved[name], 0).double() - biases[name].double()
            shifts[name] = float(gap.norm())
    return Stored(one, errors, shifts)


__all__ = [
    "KeyFactors",
    "QueryMoments",
    "key_factors",
    "key_order",
    "moments_of",
    "stored_keys",
]
