"""docs/reference/cli.md has every command and every option, and none that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from fxshare.cli import make_app
from tests.cli.conftest import ROOT

PAGE = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
EVERYWHERE = {"--json", "--debug", "--help", "--version"}
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def _commands() -> dict[str, set[str]]:
    """The long options of every command; ``bench run`` for the ``run`` of a group."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        for key, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{name} {key}".strip())
        if name and not hasattr(command, "commands"):
            spelled = [o for p in command.params for o in (*p.opts, *p.secondary_opts)]
            yield name, {option for option in spelled if option.startswith("--")}

    return dict(walk(typer.main.get_command(make_app()), ""))


def _sections(page: str) -> dict[str, str]:
    """What stands below each heading, up to the next one."""
    parts = re.split(r"^###? (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _documented(section: str) -> set[str]:
    """The options in the usage line and in the first column of the table of options."""
    usage = section.split("\n\n")[1]
    rows = re.findall(r"^\| (`-.*?) \| ", section, flags=re.MULTILINE)
    return {option for text in (usage, *rows) for option in _OPTION.findall(text)}


def _faults(page: str) -> list[str]:
    sections, faults = _sections(page), []
    for name, options in _commands().items():
        if name not in sections:
            faults.append(f"{name}: no section")
            continue
        said, there = _documented(sections[name]) - EVERYWHERE, options - EVERYWHERE
        faults += [f"{name}: {option} is missing" for option in sorted(there - said)]
        faults += [f"{name}: there is no {option}" for option in sorted(said - there)]
        if not name.startswith("bench ") and f"[`{name}`](#{name})" not in page:
            faults.append(f"{name}: not in the list of commands")
    return faults


def test_the_reference_has_every_command_and_option() -> None:
    assert len(_commands()) >= 16
    assert _faults(PAGE) == []


@pytest.mark.parametrize(
    ("written", "instead", "fault"),
    [
        ("| `--max-bytes SIZE` |", "| `--most-bytes SIZE` |", "plan: --max-bytes is missing"),
        ("| `--max-bytes SIZE` |", "| `--most-bytes SIZE` |", "plan: there is no --most-bytes"),
        ("## export\n", "## exports\n", "export: no section"),
        ("### bench generate\n", "### bench\n", "bench generate: no section"),
    ],
)
def test_what_is_missing_is_found(written: str, instead: str, fault: str) -> None:
    assert written in PAGE
    assert fault in _faults(PAGE.replace(written, instead))


def test_every_option_that_the_page_mentions_is_one_of_some_command() -> None:
    known = {option for options in _commands().values() for option in options} | EVERYWHERE
    assert set(_OPTION.findall(PAGE)) <= known
