"""``save_pretrained`` on a compiled model."""

from __future__ import annotations

import os
import re
from typing import Any

from torch import nn

from fxshare.errors import StoreError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def save_pretrained(
    gm: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> None:
    """:func:`fxshare.save` with the arguments of transformers' ``save_pretrained``.

    Writes the folder of :func:`fxshare.save`, in place of an empty folder or one of fxshare; the
    tokenizer has a ``save_pretrained`` of its own, to be called after this.

    Raises :class:`StoreError` like :func:`fxshare.save`, and for an option that it cannot follow
    (``state_dict``, ``push_to_hub``, ``safe_serialization=False``).
    """
    if options.pop("safe_serialization", True) is False:
        raise StoreError(
            "save_pretrained: safe_serialization=False would pickle the weights; a folder of "
            "fxshare holds safetensors, leave the option out"
        )
    for name in ("variant", "token", "save_peft_format", "save_original_format"):
        options.pop(name, None)
    given = sorted(name for name, value in options.items() if value not in (None, False))
    if given:
        raise StoreError(
            f"save_pretrained: {given[0]} is not supported for a compiled model; save without it"
        )
    from fxshare.store.save import save

    if is_main_process:
        save(gm, save_directory, force=True, max_shard_bytes=_bytes(max_shard_size))


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise StoreError(
            f"save_pretrained: max_shard_size: expected a number of bytes or a size such as "
            f"'5GB', found {size!r}"
        )
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()])


__all__ = ["save_pretrained"]
