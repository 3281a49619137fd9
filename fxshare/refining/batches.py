"""The data in two parts: what is trained on, and what is kept apart to measure on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxshare.base.spool import Picked, Spooled
from fxshare.capture import Call
from fxshare.data.usable import usable_batches
from fxshare.errors import RefineError

_SHARE = 10
_ORDER = 1_000_003


@dataclass(frozen=True)
class Batches:
    """``fit`` is trained on, the others are measured on. ``numbers`` are where the batches of
    ``fit`` stand in what was given, for messages."""

    fit: Sequence[object]
    held_out: Sequence[object]
    second: Sequence[object] = ()
    numbers: Sequence[int] = ()
    seed: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def at(self, number: int) -> int:
        """Which batch of ``fit`` comes at this place of an endless order, in which every epoch has
        each of them once; it depends on the seed and on nothing that ran before."""
        epoch, place = divmod(number, len(self.fit))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * _ORDER + epoch)
            self._orders.clear()
            self._orders[epoch] = torch.randperm(len(self.fit), generator=generator).tolist()
        return self._orders[epoch][place]


def divided(
    batches: Iterable[object],
    heldout: Iterable[object] | None,
    second: Iterable[object] | None,
    *,
    seed: int,
) -> Batches:
    """The batches, of which a tenth drawn by the seed is held out where ``heldout`` is None.

    Raises :class:`RefineError` for data that is empty, or one batch that cannot be divided.
    """
    given = _sequence(batches, "batches")
    further: Sequence[object] = () if second is None else _sequence(second, "second")
    if heldout is not None:
        kept_apart = _sequence(heldout, "heldout")
        return Batches(given, kept_apart, further, range(len(given)), seed)
    if len(given) == 1:
        fit, rest = _parted(given[0])
        return Batches([fit], [rest], further, [0], seed)
    count = max(round(len(given) / _SHARE), 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(given), generator=generator)[:count].tolist()
    others = [number for number in range(len(given)) if number not in set(chosen)]
    return Batches(Picked(given, others), Picked(given, sorted(chosen)), further, others, seed)


def calls_of(
    batches: Sequence[object], caller: Callable[[object], Call]
) -> Iterable[tuple[Call, object]]:
    """Each batch as a call, and as it was given."""
    for batch in batches:
        yield caller(batch), batch


def _sequence(batches: Iterable[object], name: str) -> Sequence[object]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise RefineError(
            f"{name}: expected a list of batches, or what yields them, found "
            f"{type(batches).__name__}; one batch is given as [batch]"
        )
    found = usable_batches(batches)
    made = found if isinstance(found, Sequence) else Spooled(found)
    if not len(made):
        raise RefineError(f"{name}: expected at least one batch, found none")
    return made


def _parted(batch: object) -> Sequence[object]:
    """The rows of one batch, and of these the last tenth apart."""
    named: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"": batch}
    rows = {len(v) for v in named.values() if isinstance(v, Tensor) and v.ndim}
    whole = all(isinstance(v, Tensor) and v.ndim for v in named.values())
    if not whole or len(rows) != 1 or min(rows) < 2:
        raise RefineError(
            "batches: expected at least 2, since one is held out to measure on, found 1 that "
            "cannot be divided; give smaller batches, or heldout=..."
        )
    at = -(-min(rows) * (_SHARE - 1) // _SHARE) if min(rows) >= _SHARE else min(rows) - 1
    parts = [{k: v[s] for k, v in named.items()} for s in (slice(at), slice(at, None))]
    return [part[""] if not isinstance(batch, Mapping) else part for part in parts]


__all__ = ["Batches", "calls_of", "divided"]
