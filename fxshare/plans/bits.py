"""What a plan says about bits: how many the numbers of a group, an MLP or a dense slice have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import Field

from fxshare.plans.storage import Storage
from fxshare.sites.site import Frozen, ModulePath, Site

Bits: TypeAlias = Literal[8, 4]
"""Of a code; what has none of these has the model's own dtype."""


class Rounded(Frozen):
    """Dense slices, in no group and of no MLP that is made smaller, in few bits."""

    bits: Bits
    slices: tuple[ModulePath, ...] = Field(min_length=1)
    loss: float | None = None
    """Predicted increase of the model's loss per token; None where it was not predicted."""


def few_bits(plain: Mapping[str, Any]) -> bool:
    """Whether a plan, as data, has bits anywhere."""
    parts = (*plain.get("groups", ()), *plain.get("units", ()))
    own = (one.get("bits") if isinstance(one, dict) else one.bits for one in parts)
    return bool(plain.get("rounded")) or any(bits is not None for bits in own)


def without_none(plain: dict[str, Any]) -> None:
    """Leave out of a plan as data what says nothing about bits, which earlier versions do not
    know."""
    if not plain["rounded"]:
        del plain["rounded"]
    for one in (*plain["groups"], *plain.get("units", ())):
        if one["bits"] is None:
            del one["bits"]


def matrix_bytes(bits: int | None, rows: Any, width: Any, itemsize: int) -> Any:
    """Stored bytes of a matrix whose dtype has ``itemsize`` bytes, scales included; of ints, or of
    arrays of them."""
    if bits is None:
        return rows * width * itemsize
    # as fxshare.base.quantised stores it; a test compares
    scales = rows if bits == 8 else rows * -(-width // 32)
    codes = rows * width if bits == 8 else rows * ((width + 1) // 2)
    return codes + scales * (2 if bits == 4 and itemsize == 4 else itemsize)


def factor_bytes(
    storage: Storage,
    rank: Any,
    in_features: int,
    out_features: int,
    bits: int | None,
    itemsize: int,
) -> Any:
    """Stored bytes of a basis and of its coefficients, at a rank or at several; index entries and
    scales included."""
    found = matrix_bytes(bits, rank, storage.basis_width(rank, in_features), itemsize)
    found = found + matrix_bytes(bits, out_features, rank, itemsize)
    return found + storage.indices(rank) * 4


def bits_of_slices(rounded: tuple[Rounded, ...]) -> dict[str, int]:
    """The bits of dense slices by name."""
    return {name: one.bits for one in rounded for name in one.slices}


def fault_of(
    rounded: tuple[Rounded, ...], sites: tuple[Site, ...], taken: frozenset[str]
) -> str | None:
    """What does not hold of dense slices in few bits; ``taken`` are those that are not dense."""
    known = {s.name: site for site in sites for s in site.slices}
    seen: set[str] = set()
    for one in rounded:
        for name in one.slices:
            if name not in known:
                return f"rounded: {name!r} is not a slice of any site"
            if name in seen:
                return f"rounded: {name!r} is named twice"
            seen.add(name)
            if name in taken:
                return (
                    f"rounded: {name!r} is in a group or an MLP that is made smaller; give that "
                    "the bits"
                )
    return None


__all__ = [
    "Bits",
    "Rounded",
    "bits_of_slices",
    "factor_bytes",
    "fault_of",
    "few_bits",
    "matrix_bytes",
    "without_none",
]
