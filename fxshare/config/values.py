"""Checks of single values.

Each returns what is stored, or raises a ``ValueError`` that says what was expected and found.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Annotated

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter

from fxshare.config.wording import SHORT, nearest, one_line, shown

CONFIG_VERSION = 1
"""The newest ``version`` of a configuration that this fxshare reads."""
_TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_PASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        glob = (
            "; patterns are regular expressions: write '.*' for a glob's '*'"
            if error.msg.startswith("nothing to repeat")
            else ""
        )
        raise ValueError(
            f"expected a regular expression, found {shown(pattern)}: "
            f"{one_line(error.msg)}{where}{glob}"
        ) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected a regular expression, found {shown(pattern)}: {error}"
        ) from None


def _number(value: object, expected: str) -> float:
    """``value`` as a finite float; ``true`` and ``"0.5"`` are refused, not converted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected {expected}; found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected {expected}; found {shown(value)}, which is not finite")
    return number


def as_split(value: object) -> object:
    """The spellings of ``split``: true is qkv; false, null and "none" are no split."""
    if value is True:
        return "qkv"
    if value is None or value is False or (isinstance(value, str) and value == "none"):
        return False
    if isinstance(value, str) and value in ("qkv", "heads", "gate_up"):
        return value
    raise ValueError(
        f"expected false, qkv, heads or gate_up (true means qkv); found {shown(value)}."
        + (nearest(value, ("qkv", "heads", "gate_up", "none")) if isinstance(value, str) else "")
    )


def as_permutation(value: str) -> str:
    """``qkv_order``: each of q, k and v once."""
    counts = Counter(value)
    if sorted(value) == sorted("qkv"):
        return value
    faults = [f"{part} twice" for part in "qkv" if counts[part] == 2]
    faults += [f"{part} {counts[part]} times" for part in "qkv" if counts[part] > 2]
    faults += [f"{part} missing" for part in "qkv" if counts[part] == 0]
    foreign = "".join(sorted(set(value) - set("qkv")))
    if foreign:
        faults.append(f"{SHORT.repr(foreign)} not among q, k, v")
    raise ValueError(
        "expected a permutation of 'qkv', the order of the fused projection's row blocks; "
        f"found {shown(value)}: {', '.join(faults)}"
    )


def as_kept(value: object) -> float | None:
    """A fraction of parameters kept, above 0."""
    if value is None:
        return None
    expected = (
        "the fraction of parameters kept, a finite number above 0 (0.8 keeps 80 % of the "
        "parameters and removes 20 %)"
    )
    kept = _number(value, expected)
    if kept <= 0:
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return kept


def as_budget(value: object) -> float | None:
    """A fraction kept that is a limit, of numbers or of bytes: above 0 and at most 1."""
    kept = as_kept(value)
    if kept is not None and kept > 1:
        percent = f"; {kept:g} % is {kept / 100:g}" if kept <= 100 else ""
        raise ValueError(
            "expected the fraction kept, above 0 and at most 1 (0.8 keeps 80 %); found "
            f"{shown(value)}{percent}"
        )
    return kept


def as_loss(value: object) -> float | None:
    """An increase of the loss per token, in nats, above 0."""
    if value is None:
        return None
    expected = "an increase of the loss per token in nats, a finite number above 0"
    loss = _number(value, expected)
    if loss <= 0:
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return loss


def as_part(value: object) -> float:
    """A share of the dense cost, from 0 to 1."""
    expected = "a share of the dense cost, a number from 0 to 1"
    part = _number(value, expected)
    if not 0 <= part <= 1:
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return part


def as_floor(value: object) -> float:
    """A fraction of the largest eigenvalue, above 0 and below 1."""
    expected = "a fraction of the largest eigenvalue, a number above 0 and below 1"
    floor = _number(value, expected)
    if not 0 < floor < 1:
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return floor


def as_pattern(value: str) -> str:
    """A regular expression."""
    _compiled(value)
    return value


def as_block_pattern(value: str) -> str:
    """A regular expression with a group 1, the layer number."""
    if _compiled(value).groups < 1:
        raise ValueError(
            "expected a regular expression whose group 1 is the layer number, as in "
            rf"'h\.(\d+)'; found {shown(value)}, which has no group"
        )
    return value


def as_type_name(value: str) -> str:
    """The name of a weight type."""
    if _TYPE_NAME.fullmatch(value) is None:
        raise ValueError(
            "expected a name of a weight type: a letter or '_', then letters, digits, '_' or '-' "
            f"(no dots, slashes or spaces); found {shown(value)}"
        )
    return value


def as_pass_name(value: str) -> str:
    """A pass as ``package.module:Name``."""
    if _PASS_NAME.fullmatch(value) is None:
        raise ValueError(
            "expected a pass as 'package.module:Name', the name of a class in an importable "
            f"module; found {shown(value)}"
        )
    return value


def as_version(value: int) -> int:
    """A version of the format that this fxshare reads."""
    if value > CONFIG_VERSION:
        raise ValueError(
            f"expected at most {CONFIG_VERSION}; found {shown(value)}: this configuration was "
            "made for a newer fxshare, update fxshare"
        )
    return value


def as_bits(value: object) -> tuple[int, ...]:
    """Widths of numbers, each once, the widest first."""
    expected = "a list of one or more of 16, 8 and 4, each once, such as [16, 8, 4]"
    found = tuple(value) if isinstance(value, list | tuple) else ()
    known = all(type(bits) is int and bits in (16, 8, 4) for bits in found)
    if not found or not known or len(set(found)) < len(found):
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return tuple(sorted(found, reverse=True))


def as_list(value: object) -> object:
    """A list or a tuple, which have an order."""
    # Pydantic would also take a set, whose order means nothing.
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, such as [a, b]; found {shown(value)}")
    return value


def as_size(value: object) -> int | None:
    """Bytes above 0, as a whole number or with a unit."""
    if value is None:
        return None
    expected = "bytes, as a whole number above 0 or with a unit, such as 8GB or 512MiB"
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValueError:  # pydantic's is one
        raise ValueError(f"expected {expected}; found {shown(value)}") from None
    if size <= 0:
        raise ValueError(f"expected {expected}; found {shown(value)}")
    return size


Count = Annotated[int, Field(strict=True, ge=1)]
"""A whole number above 0."""
Kept = Annotated[float | None, BeforeValidator(as_budget)]
"""A fraction kept, above 0 and at most 1; None where it is not given."""
Share = Annotated[float | None, BeforeValidator(as_kept)]
"""A fraction kept, above 0; None where it is not given."""
