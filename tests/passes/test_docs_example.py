"""The code in the documents about passes runs, and the graphs they show are the real ones."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import fx

import passes

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, label and text of every fenced block."""
    for found in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        yield found[1], found[2] or "", found[3]


def test_write_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict[str, Any] = {"__name__": "document"}
    written = []
    for language, _, text in blocks("how-to/write-a-pass.md"):
        named = _FILE.match(text)
        if named:
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
            written.append(named[1])
        elif language == "python":
            exec(compile(text, "write-a-pass.md", "exec"), scope)
    assert written == ["scaling.py", "model.yaml"]
    assert scope["compiled"].fxshare.report.passes[1]["rewrites"] == 1
    sys.modules.pop("scaling")


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
