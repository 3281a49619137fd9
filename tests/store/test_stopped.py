"""Saving that is killed or interrupted before an operation on files: the older folder or the new
one is there, whole, and the next run that writes or loads it leaves nothing else."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.cli import main
from fxshare.errors import FxShareWarning, StoreError
from tests import stops
from tests.store.test_store import compiled, ids, toy

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
SLOW = pytest.mark.slow


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Two compiled models that differ in their weights."""
    found = []
    for scale in (1.0, 0.9):
        model = toy()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        found.append(compiled(model))
    return found


def _places(tmp_path: Path) -> tuple[Path, Path]:
    folder, kept = tmp_path / "at", tmp_path / "kept"
    for each in (folder, kept):
        each.mkdir()
    return folder, kept


def _stopped(
    work: Callable[[], object], folder: Path, kept: Path, exchanging: bool
) -> tuple[list[Path], dict[str, bytes]]:
    """What each stopped run left, and what the one that was not made."""
    ended = stops.everywhere(work, folder, kept, exchanging=exchanging)
    assert (ended.code, ended.error) == (0, "")
    left = sorted(kept.iterdir())
    codes = sorted(path.name.split(".", 1)[1] for path in left)
    count = len(ended.operations)
    assert codes == ["SIGINT.130"] * count + ["SIGKILL.-9"] * count
    assert count > 10, "the operations are not seen"
    print(f"{count} operations, {len(left)} runs stopped")
    return left, everything(folder)


def _seen(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".")}


def _loads(folder: Path, models: list[Any], which: list[int]) -> None:
    """That the folder is one of the two, and loading it leaves nothing beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        loaded = fxshare.load(folder, toy())
    x = ids()
    same = [torch.equal(_output(loaded, x), _output(models[n], x)) for n in (0, 1)]
    assert same.count(True) == 1
    assert same.index(True) in which
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def _output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize(
    ("replacing", "exchanging", "every"),
    [
        pytest.param(True, True, 16, id="sample"),
        pytest.param(False, True, 1, id="new", marks=SLOW),
        pytest.param(True, True, 1, id="replacing", marks=SLOW),
        pytest.param(True, False, 1, id="two steps", marks=SLOW),
    ],
)
def test_save(
    replacing: bool, exchanging: bool, every: int, models: list[Any], tmp_path: Path
) -> None:
    folder, kept = _places(tmp_path)
    if replacing:
        fxshare.save(models[0], folder / "out")
    old = everything(folder)

    def work() -> None:
        fxshare.save(models[1], folder / "out", force=True, max_shard_bytes=2000)

    left, new = _stopped(work, folder, kept, exchanging)
    assert sum(name.endswith(".safetensors") for name in new) > 1
    for number, path in enumerate(left):
        found = everything(path)
        if "SIGINT" in path.name:
            assert found in (old, new), path.name
        elif exchanging:
            assert _seen(found) in (old, new), path.name
        if number % every:
            continue
        if not replacing and not (path / "out").exists():
            with pytest.raises(StoreError):
                fxshare.load(path / "out", toy())
            assert not list(path.iterdir())
        elif number % 6 == 0 or not (path / "out").exists():
            _loads(path / "out", models, [0, 1] if replacing else [1])
        else:
            again = stops.run(
                lambda to=path / "out": _saved_again(models[1], to),  # type: ignore[misc]
                path,
                exchanging=exchanging,
            )
            assert (again.code, again.error) == (0, "")
            assert everything(path) == new, path.name


def _saved_again(model: Any, path: Path) -> None:
    warnings.simplefilter("ignore", FxShareWarning)
    fxshare.save(model, path, force=True, max_shard_bytes=2000)


@SLOW
@pytest.mark.parametrize("exchanging", [True, False], ids=["exchanged", "two steps"])
def test_compile_and_save(
    exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = _places(tmp_path)
    types = "weight_types: {fc: {pattern: '.*\\.mlp\\.c_fc$'}}\nblock_pattern: 'h\\.(\\d+)'\n"
    (tmp_path / "a.yaml").write_text(types)
    (tmp_path / "b.yaml").write_text(f"{types}group_size: 2\ncompression_rate: 0.5\n")
    out = folder / "out"

    def work(name: str) -> None:
        command = ["compile", "embedded", "-c", str(tmp_path / name), "-o", str(out), "--force"]
        with warnings.catch_warnings():
            code = main([*command, "-q"])
        if code == 130:
            raise KeyboardInterrupt
        assert code == 0

    first = stops.run(lambda: work("a.yaml"), folder)
    assert (first.code, first.error) == (0, "")
    old = everything(folder)
    left, new = _stopped(lambda: work("b.yaml"), folder, kept, exchanging)
    for path in left:
        found = everything(path)
        _same(found if "SIGINT" in path.name else _seen(found), old, new, two=not exchanging)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxShareWarning)
            fxshare.load(path / "out")
        assert [each.name for each in path.iterdir()] == ["out"]
        _same(everything(path), old, new, two=False)
        shutil.rmtree(path)


def _same(
    found: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes], *, two: bool
) -> None:
    assert found in (old, new) or (two and not found)
