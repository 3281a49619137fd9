"""The tutorial's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text("utf-8"), flags=re.DOTALL)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (yaml,) = blocks("yaml")
    (tmp_path / "gpt.yaml").write_text(yaml, encoding="utf-8")
    scope: dict[str, object] = {}
    # less text than in the tutorial: what is tested is that it runs
    code = "\n".join(blocks("python")).replace("n_bytes=100_000", "n_bytes=12_000")
    budget = '{"params_kept": 0.8}'
    code = code.replace(budget, budget + ', "planner": {"search": "off"}')
    exec(compile(code, str(TUTORIAL), "exec"), scope)
