"""JSON from a file that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

_DEEPEST = 100


def parse_json(text: str | bytes) -> Any:
    """What ``text`` says; ``ValueError`` where it is no JSON, or is nested so deeply (100 levels)
    that whoever walks it could run out of stack."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    level = [found]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return found
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"nested too deeply: expected at most {_DEEPEST} levels"


__all__ = ["parse_json"]
