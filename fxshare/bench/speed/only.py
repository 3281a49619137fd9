"""``--only``: some of the linears that weight types match."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxshare.errors import ConfigError
from fxshare.sites.patterns import Pattern


def types_of_only(types: dict[str, Any], model: nn.Module, only: str) -> dict[str, Any]:
    """The weight types with no more than the linears whose names ``only`` matches too.

    Raises :class:`ConfigError` where that is none.
    """
    if not only:
        return types
    names = [name for name, _ in model.named_modules()]
    found = {}
    for key, value in types["weight_types"].items():
        both = f"(?={only})(?:{value['pattern']})"
        pattern = Pattern(both)
        if any(pattern.match(name) for name in names):
            found[key] = {**value, "pattern": both}
    if not found:
        known = [v["pattern"] for v in types["weight_types"].values()]
        patterns = [Pattern(pattern) for pattern in known]
        matched = [n for n in names if any(pattern.match(n) for pattern in patterns)]
        raise ConfigError(
            f"--only: {only!r} matches none of the linears that the weight types match, such as "
            f"{', '.join(matched[:4]) or 'none'}"
        )
    return {**types, "weight_types": found}
