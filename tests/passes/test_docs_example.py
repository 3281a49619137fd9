"""What the documents say about passes: the graphs that they show are the real ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import fx

import passes

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, label and text of every fenced block."""
    for found in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        yield found[1], found[2] or "", found[3]


def lines_of(gm: fx.GraphModule) -> list[str]:
    return [line.partition(";  ")[0].strip() for line in gm.code.splitlines()]


def test_rewriting() -> None:
    scope: dict[str, Any] = {"__name__": "document"}
    shown: dict[str, list[str]] = {}
    for language, label, text in blocks("explanation/rewriting.md"):
        if language == "python":
            exec(compile(text, "rewriting.md", "exec"), scope)
        elif label:
            shown[label] = text.splitlines()
    reused, _ = passes.run(scope["shared"], [passes.ReuseBasis()])
    stages = {
        "original": scope["graph"],
        "split": scope["split"],
        "shared": scope["shared"],
        "reused": reused,
        "fused": scope["fused"],
    }
    assert list(shown) == list(stages)
    for label, lines in shown.items():
        found = lines_of(stages[label])
        start = found.index(lines[0])
        assert found[start : start + len(lines)] == lines, label


def test_the_reference_lists_every_pass_and_option() -> None:
    page = (DOCS / "reference/passes.md").read_text(encoding="utf-8")
    for name in passes.__all__:
        one = getattr(passes, name)
        if isinstance(one, type) and issubclass(one, passes.Pass) and one is not passes.Pass:
            row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
            assert f"`{one.name}`" in row
            assert ("yes" if one.exact else "no") in row.split("|")[4]
            for option in dataclasses.fields(one):
                assert f"`{option.name}`" in row
