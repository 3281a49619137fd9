"""The code blocks of a page, and what the page says of them where readers do not see it.

Two comments of HTML are read::

    <!-- run:
    model = small()          # set-up that a reader has already, run before what follows
    -->

    <!-- not run: needs a GPU -->

the second directly before the block that it is about. A block is saved as a file where the sentence
before it ends in "as `NAME`:".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_COMMENT = r"^<!-- (?P<directive>run|not run):(?P<said>.*?)-->$"
_FENCE = r"^(?P<fence>```+)(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)$"
_PIECE = re.compile(f"{_COMMENT}|{_FENCE}", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"\bas\s+`([\w.-]+\.\w+)`:\s*$")


@dataclass(frozen=True)
class Block:
    """One block, or one hidden piece of set-up."""

    line: int
    """Of its first line of code, from 1."""
    language: str
    text: str
    reason: str | None = None
    """Why it is not run, where it is not."""
    saved_as: str | None = None
    """The file that the sentence before it names."""


def blocks_of(page: str) -> Iterator[Block]:
    """The blocks of a page in order, hidden set-up included.

    Raises ``ValueError`` for a fence that is no block (indented, or never closed) and for a "not
    run" that no block follows: neither would be noticed otherwise.
    """
    fences = re.findall(r"^[ \t]*(```|~~~)", page, re.MULTILINE)
    reason, end, found = None, 0, 0
    for piece in _PIECE.finditer(page):
        between = page[end : piece.start()]
        if reason is not None and (between.strip() or piece["directive"]):
            raise ValueError(f"'not run: {reason}' does not stand before a block")
        line = page.count("\n", 0, piece.start()) + 2
        end = piece.end()
        if piece["directive"] == "not run":
            reason = piece["said"].strip()
        elif piece["directive"] == "run":
            yield Block(line, "python", piece["said"].removeprefix("\n"))
        else:
            found += 2
            saved = _SAVED.search(between)
            yield Block(line, piece["language"], piece["text"], reason, saved[1] if saved else None)
            reason = None
    if reason is not None or found != len(fences):
        raise ValueError(f"{len(fences)} fences, {found} of them are blocks; or 'not run' is last")


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block: prompts, comments and line ends taken off, ``&&`` divided."""
    text = re.sub(r"^\$ ", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    commands: list[list[str]] = []
    for line in filter(None, lines):
        commands.append([])
        for word in line:
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append(word)
    return commands
