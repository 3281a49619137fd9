"""How much of what could be rewritten stays dense, and what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxshare.proposing.weights import Weight, alike, weights_of
from fxshare.sites.site import Site, Skipped

WORTH_A_WARNING = 0.1
"""Share of the weights above which it is said that they stay dense."""
_LISTED = 3
_PART = re.compile(r"\.(?:rows_\d+_\d+|\d+)$")


@dataclass(frozen=True)
class _Left:
    names: tuple[str, ...]
    numbers: int
    reason: str


def left_dense(model: nn.Module, sites: Sequence[Site], skipped: Sequence[Skipped]) -> str | None:
    """A warning where more than a tenth of the weights that were matched, or could be, is in no
    site, with the share and the largest of them; None where it is less.

    What is in no layer of a model that has layers does not count (heads, embeddings): it is left
    out by design, unless a pattern matches it.
    """
    weights = weights_of(model)
    if any(weight.layer is not None for weight in weights):
        reasons = {_whole(s.name) for s in skipped}
        weights = [w for w in weights if w.layer is not None or w.name in reasons]
    in_sites: dict[str, int] = {}
    for site in sites:
        for name in {_whole(name) for name in (site.name, *site.readers)}:
            in_sites[name] = in_sites.get(name, 0) + site.weights
    total = sum(weight.numbers for weight in weights)
    left = [_left(group, in_sites, skipped) for group in alike(weights)]
    numbers = sum(one.numbers for one in left)
    if not total or numbers <= WORTH_A_WARNING * total:
        return None
    largest = sorted((one for one in left if one.numbers), key=lambda one: -one.numbers)
    listed = "; ".join(_told(one, total) for one in largest[:_LISTED])
    more = f"; and {len(largest) - _LISTED} more" if len(largest) > _LISTED else ""
    return (
        f"{numbers / total:.0%} of the weights that could be rewritten stay dense: {listed}{more}"
    )


def _left(group: Sequence[Weight], covered: dict[str, int], skipped: Sequence[Skipped]) -> _Left:
    missing = [w for w in group if covered.get(w.name, 0) < w.numbers]
    numbers = sum(w.numbers - covered.get(w.name, 0) for w in missing)
    names = tuple(w.name for w in missing)
    said = next((s.reason for s in skipped if {s.name, _whole(s.name)} & set(names)), None)
    return _Left(names, numbers, said or "no pattern matches it")


def _told(one: _Left, total: int) -> str:
    more = f" and {len(one.names) - 1} more" if len(one.names) > 1 else ""
    return f"{one.names[0]}{more} ({one.numbers / total:.0%}: {one.reason})"


def _whole(name: str) -> str:
    """The parameter of a site that is one matrix of a stack, or some rows of one."""
    return _PART.sub("", name)
