"""Passes that a configuration names: what is found there, and what is no pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxshare.compiling.given import named_passes
from fxshare.config import load_config
from fxshare.errors import ConfigError
from passes import MergeSlices, ReuseBasis

Names = dict[str, int]  # Python 3.10 takes it for an instance of type
AN_INSTANCE = ReuseBasis()


def named(name: str) -> object:
    cfg = load_config({"weight_types": {"fc": {"pattern": "fc"}}, "passes": [name]})
    (found,) = named_passes(cfg)
    return found


def test_a_class_is_made_and_an_instance_taken() -> None:
    assert named("passes:MergeSlices") == MergeSlices()
    assert named(f"{__name__}:AN_INSTANCE") is AN_INSTANCE


@pytest.mark.parametrize(
    ("attribute", "kind"), [("Names", "GenericAlias"), ("ConfigError", "type"), ("named", "func")]
)
def test_what_is_no_pass_is_refused(attribute: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{attribute}' is a {kind}.*expected a subclass"):
        named(f"{__name__}:{attribute}")


def test_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passes_of_mine.py").write_text(
        "from passes import ReuseBasis\nOWN = ReuseBasis()\n"
    )
    assert named("passes_of_mine:OWN") == ReuseBasis()
    (tmp_path / "passes_that_raise.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(ConfigError, match=r"^passes: importing .* failed: RuntimeError: not today"):
        named("passes_that_raise:OWN")
    with pytest.raises(ConfigError, match=r"^passes: cannot import 'no_such_module:X'"):
        named("no_such_module:X")
