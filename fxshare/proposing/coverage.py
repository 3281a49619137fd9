"""How much of what could be rewritten stays dense, and what it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fxshare.proposing.weights import weights_of
from fxshare.sites.site import Site, Skipped

WORTH_A_WARNING = 0.1
"""Share of the weights above which it is said that they stay dense."""
_LISTED = 3
_PART = re.compile(r"\.(?:rows_\d+_\d+|\d+)$")
_NUMBER = re.compile(r"\d+")


@dataclass
class _Pool:
    """Numbers of each weight that was matched or could be, and how many of them are in sites."""

    model: nn.Module
    numbers: dict[str, int]
    in_sites: Counter[str]

    def whole(self, name: str) -> str:
        """The parameter of a site that is one matrix of a stack, or some rows of one."""
        while name not in self.numbers and _PART.search(name) and _tensor(self.model, name) is None:
            name = _PART.sub("", name)
        return name


def left_dense(model: nn.Module, sites: Sequence[Site], skipped: Sequence[Skipped]) -> str | None:
    """A warning where more than a tenth of the weights that were matched, or could be, is in no
    site, with the share and the largest of them; None where it is less.

    What is in no layer of a model that has layers does not count (heads, embeddings): it is left
    out by design, unless a pattern matches it.
    """
    weights = weights_of(model)
    in_layers = [weight for weight in weights if weight.layer is not None]
    pool = _Pool(model, {w.name: w.numbers for w in in_layers or weights}, Counter())
    for site in sites:
        names = {pool.whole(name) for name in (site.name, *site.readers)}
        known = next((name for name in sorted(names) if name in pool.numbers), None)
        name = known or pool.whole(site.name)
        pool.in_sites[name] += site.weights
        if known is None:
            tensor = _tensor(model, name)
            pool.numbers[name] = site.weights if tensor is None else tensor.numel()
    reasons: dict[str, str] = {}
    for one in skipped:
        name = pool.whole(one.name)
        tensor = _tensor(model, name)
        if tensor is not None and name not in pool.numbers:
            pool.numbers[name] = tensor.numel()
        reasons.setdefault(name, one.reason)
    return _warning(pool, reasons)


def _warning(pool: _Pool, reasons: Mapping[str, str]) -> str | None:
    left = {name: n - pool.in_sites[name] for name, n in pool.numbers.items()}
    total, numbers = sum(pool.numbers.values()), sum(n for n in left.values() if n > 0)
    if numbers <= WORTH_A_WARNING * total:
        return None
    alike: dict[tuple[str, str], list[str]] = {}
    for name in (name for name, n in left.items() if n > 0):
        kind = (_NUMBER.sub("#", name), _NUMBER.sub("#", reasons.get(name, "")))
        alike.setdefault(kind, []).append(name)
    by_size = sorted(alike.items(), key=lambda item: -sum(left[name] for name in item[1]))
    told = []
    for _, names in by_size[:_LISTED]:
        reason = reasons.get(names[0], "no pattern matches it").partition(". ")[0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        share = sum(left[name] for name in names) / total
        told.append(f"{names[0]}{more} ({share:.0%}: {reason})")
    if len(by_size) > _LISTED:
        told.append(f"and {len(by_size) - _LISTED} more kinds")
    return f"{numbers / total:.0%} of the weights that could be rewritten stay dense: " + "; ".join(
        told
    )


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter of that name, or the weight of the module of that name."""
    for full in (name, f"{name}.weight"):
        owner, _, field = full.rpartition(".")
        try:
            found = getattr(model.get_submodule(owner), field, None)
        except AttributeError:
            continue
        if isinstance(found, Tensor):
            return found
    return None
