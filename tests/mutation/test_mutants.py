"""The mutants themselves: each change on a small function, and what tests say of a changed one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.__main__ import EQUIVALENT, PARTS, equivalents, every_mutant
from tests.mutation.judge import functions_by_place, judge, put
from tests.mutation.mutants import mutants_of, mutated

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="code objects have qualified names from Python 3.11 on"
)


def changed(folder: Path, source: str, change: str) -> Callable[..., object]:
    """``f`` of the source with its only mutant of this change."""
    path = folder / "toy.py"
    path.write_text(source)
    (mutant,) = (m for m in mutants_of(path, "toy.py") if m.change == change)
    line, code = mutated(path, mutant)
    assert line == code.co_firstlineno
    space: dict[str, Callable[..., object]] = {}
    exec(compile(source, str(path), "exec"), space)
    space["f"].__code__ = code
    return space["f"]


@pytest.mark.parametrize(
    ("body", "change", "given", "was", "becomes"),
    [
        ("return a < 2", "Lt to LtE", 2, False, True),
        ("return a in (2,)", "In to NotIn", 2, True, False),
        ("return a - 1", "Sub to Add", 2, 1, 3),
        ("return a // 2", "FloorDiv to Mult", 3, 1, 6),
        ("return a and 5", "And to Or", 3, 5, 3),
        ("return not a", "Not left out", 3, False, 3),
        ("return -a", "USub left out", 3, -3, 3),
        ("if a > 1:\n        a = 9\n    return a", "never", 3, 9, 3),
        ("if a > 1:\n        a = 9\n    return a", "always", 0, 0, 9),
        ("return 7 if a else a", "7 changed", 1, 7, 8),
        ("return a is True", "True changed", True, True, False),
        ("return min(a, 4)", "min to max", 2, 2, 4),
        ("return a", "returns None", 2, 2, None),
        ("for b in (1, 2):\n        if b < a:\n            continue\n        a += b\n    return a",
         "break instead", 2, 4, 2),
        ("b = [a]\n    b.append(a)\n    return len(b)", "left out", 2, 2, 1),
        ("while a < 5:\n        a = a + 2\n    return a", "never", 2, 6, 2),
    ],
)  # fmt: skip
def test_each_change_changes_what_it_says(
    tmp_path: Path, body: str, change: str, given: object, was: object, becomes: object
) -> None:
    source = f"def f(a):\n    {body}\n"
    space: dict[str, Callable[..., object]] = {}
    exec(source, space)
    assert space["f"](given) == was
    assert changed(tmp_path, source, change)(given) == becomes


def test_texts_annotations_and_log_lines_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text(
        "def f(a: int = 3) -> int:\n"
        '    """The 1 docstring."""\n'
        "    _LOG.info('%d', 1)\n"
        "    b: Literal[1]\n"
        "    text = f'{a + 1}'\n"
        "    assert a > 1\n"
        "    raise ValueError('one' + 'two', 1)\n"
    )
    assert [m.change for m in mutants_of(path, "toy.py")] == ["left out"]


def test_a_mutants_key_tells_equal_lines_apart_and_stays_where_lines_are_added(
    tmp_path: Path,
) -> None:
    path = tmp_path / "toy.py"
    source = "def f(a):\n    a = a + a + a\n    a = a + a + a\n    return a\n"
    path.write_text(source)
    before = [m.key for m in mutants_of(path, "toy.py")]
    assert len(set(before)) == len(before) == 5
    path.write_text("import os\n\n\n" + source)
    assert [m.key for m in mutants_of(path, "toy.py")] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are made in forked processes")
def test_a_mutant_is_killed_by_a_test_that_looks_and_survives_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mutated_toy.py").write_text("def double(a):\n    return a * 2\n")
    looks = "from mutated_toy import double\n\n\ndef test_it():\n    assert double(3) == 6\n"
    (tmp_path / "test_mutated_looks.py").write_text(looks)
    (tmp_path / "test_mutated_blind.py").write_text(looks.replace(" == 6", ""))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: left out\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    toy = importlib.import_module("mutated_toy")
    try:
        (mutant,) = (
            m
            for m in mutants_of(tmp_path / "mutated_toy.py", "mutated_toy.py")
            if m.change == "2 changed"
        )
        places = functions_by_place(str(tmp_path))
        of = {
            name: judge(tmp_path, mutant, [f"test_mutated_{name}.py"], limit=60, places=places)
            for name in ("looks", "blind")
        }
        assert of == {"looks": "killed", "blind": "survived"}
        assert toy.double(3) == 6  # the change was made in the forked process only
        assert judge(tmp_path, mutant, ["test_mutated_looks.py"], limit=60, places={}) == (
            "not applicable"
        )
        assert put(tmp_path, mutant, places)
        assert toy.double(3) == 9
    finally:
        del sys.modules["mutated_toy"]


def test_what_is_listed_as_equivalent_is_a_mutant_and_has_a_reason() -> None:
    """A line that was changed since is no longer what the reason was given for."""
    known = {m.key for part in PARTS for m in every_mutant(part)}
    assert not equivalents().keys() - known


def test_an_equivalent_mutant_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / EQUIVALENT.name
    path.write_text("a.py:f:Lt to LtE at if a < b:\n")
    with pytest.raises(ValueError, match="no reason after"):
        equivalents(path)
