"""How a value, a key and a near miss are spelled in a message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import TypeAlias

Loc: TypeAlias = tuple[str | int, ...]
"""The steps from the top of a configuration to one key."""
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxtuple = 2, 4, 4, 4
SHORT.maxstring = SHORT.maxother = 80


def shown(value: object) -> str:
    """``value`` as the user wrote it, shortened, with its kind where the spelling does not tell."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    try:
        text = SHORT.repr(value)
    except Exception:  # a foreign __repr__, or an int beyond Python's limit on digits
        return f"a value of type {type(value).__name__}"
    return f"{text} (text)" if isinstance(value, str) else text


def one_line(text: str) -> str:
    """``text`` on one line: as it is where printable, else quoted and escaped."""
    return text if text.isprintable() and 0 < len(text) <= 200 else SHORT.repr(text)


def dotted(loc: Loc) -> str:
    """``("weight_types", "attn", "n_head")`` -> ``weight_types.attn.n_head``."""
    return ".".join(
        f"'{one_line(str(step))}'" if isinstance(step, str) and "." in step else one_line(str(step))
        for step in loc
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"``, or nothing where no choice is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    word = word.lower()[:100]
    # A whole part of a name first: to difflib `rate` is nearer to private than compression_rate.
    near = [choice for choice in by_lower if word in choice.split("_")]
    near = near or difflib.get_close_matches(word, by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""
