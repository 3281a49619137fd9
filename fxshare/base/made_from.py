"""What a work folder was made from, in a file of it, and whether it is that still."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from fxshare.base.files import write_text
from fxshare.errors import StoreError


def hold_to(
    file: Path,
    made_from: Mapping[str, str],
    called: Mapping[str, str],
    *,
    number: int,
    told: Collection[str],
) -> None:
    """Compare the fingerprints of some parts with those in ``file``, or write them where there is
    none.

    Raises :class:`StoreError` for a file that cannot be read, one of another format ``number``, and
    for the parts that differ, by what they are ``called``; of parts that are ``told`` with both.
    """
    folder = file.parent
    if not file.exists():
        made = {"format": number, "made_from": dict(made_from)}
        write_text(file, json.dumps(made, indent=1) + "\n")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known, format_number = dict(found["made_from"]), found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file} cannot be read: {error}; remove the folder, or give another"
        ) from error
    if format_number != number:
        raise StoreError(
            f"{folder} has format {format_number!r}, this fxshare reads {number}; remove it, or "
            "give another"
        )
    differ = []
    for part, value in made_from.items():
        if known.get(part) != value:
            detail = f" ({known.get(part)}, now {value})" if part in told else ""
            differ.append(f"{called[part]}{detail}")
    if differ:
        raise StoreError(
            f"work folder {folder} was made with {', and '.join(differ)}; give another folder, or "
            "remove this one to begin anew"
        )


__all__ = ["hold_to"]
