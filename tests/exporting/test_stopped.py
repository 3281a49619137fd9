"""Exports that are killed or interrupted before an operation on files: the older export or the new
one is there, whole and of one piece, and the next one leaves nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxshare
from fxshare.errors import FxShareWarning
from fxshare.exporting import place
from fxshare.exporting.certifying.certificate import NAME, changes_since, read_certificate
from fxshare.exporting.targets import dense, python
from tests import stops
from tests.exporting import build

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
OURS: dict[str, Callable[[str], bool]] = {"py": python.ours, "dense": dense.ours}
TARGETS = [
    ("dense", "m"),
    ("dense", "m.safetensors"),
    pytest.param("py", "m", marks=pytest.mark.slow),
    pytest.param("pt2", "m.pt2", marks=pytest.mark.slow),
    pytest.param("onnx", "m.onnx", marks=pytest.mark.slow),
    pytest.param("aoti", "m.pt2", marks=pytest.mark.slow),
]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, but for what a certificate says of time. One beside a file
    cannot appear with it: it is looked at in :func:`_check_beside`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for name in [n for n in found if n.endswith(f".{NAME}") and not n.startswith(".")]:
        _check_beside(folder / name.removesuffix(f".{NAME}"))
        del found[name]
    timed = re.compile(rb'"(seconds|sha256)": .*')
    return {n: timed.sub(b"", f) if n.endswith(NAME) else f for n, f in found.items()}


def _check_beside(export: Path) -> None:
    """A certificate beside a file is whole, and says whether the file is the one it was made of."""
    certificate = read_certificate(export)
    changes = changes_since(export, certificate)
    assert changes in ([], [f"{export.name} was changed"]), changes


@pytest.fixture
def sessions_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of onnxruntime that a copy of this process can end: a copy has none of the threads
    that a session waits for."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession

    def alone(path: Any, **options: Any) -> Any:
        given = runtime.SessionOptions()
        given.intra_op_num_threads = given.inter_op_num_threads = 1
        return session(path, given, **options)

    monkeypatch.setattr(runtime, "InferenceSession", alone)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Two compiled models that differ in their weights."""
    one, other = build.model(n_layer=1), build.model(n_layer=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return build.compiled(one, **build.SHARING), build.compiled(other, **build.SHARING)


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchanged", "two steps"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize(("to", "name"), TARGETS)
def test_stopped_before_every_operation(
    to: Any,
    name: str,
    replacing: bool,
    exchanging: bool,
    models: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if to == "onnx":
        request.getfixturevalue("sessions_without_threads")
    is_folder = not Path(name).suffix
    if not exchanging and not (is_folder and replacing):
        pytest.skip("nothing is exchanged")
    folder, kept = tmp_path / "at", tmp_path / "kept"
    for each in (folder, kept):
        each.mkdir()
    if replacing:
        first = stops.run(lambda: fxshare.export(models[0], folder / name, to=to), folder)
        assert (first.code, first.error) == (0, "")
    old = everything(folder)

    def work() -> object:
        return fxshare.export(models[1], folder / name, to=to, force=replacing)

    ended = stops.everywhere(work, folder, kept, exchanging=exchanging)
    assert (ended.code, ended.error) == (0, "")
    new = everything(folder)
    assert new != old
    assert set(new) == set(old) or not replacing
    ours = OURS.get(to) if is_folder else None
    _check(kept, len(ended.operations), name, old, new, ours, two_steps=not exchanging)


def _check(
    kept: Path,
    operations: int,
    name: str,
    old: dict[str, bytes],
    new: dict[str, bytes],
    ours: Callable[[str], bool] | None,
    *,
    two_steps: bool,
) -> None:
    left = sorted(kept.iterdir())
    codes = sorted(path.name.split(".", 1)[1] for path in left)
    print(f"{operations} operations, {len(left)} runs stopped")
    assert codes == ["SIGINT.130"] * operations + ["SIGKILL.-9"] * operations
    for path in left:
        found = everything(path)
        if "SIGINT" in path.name:
            assert found in (old, new), path.name
        elif not two_steps:
            assert _seen(found) in (old, new), path.name
        _next(path / name, ours)
        assert everything(path) in (old, new), path.name
        shutil.rmtree(path)


def _seen(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".")}


def _next(path: Path, ours: Callable[[str], bool] | None) -> None:
    """What the next export to ``path`` does first, and what it leaves when it then fails."""
    with warnings.catch_warnings(), contextlib.suppress(ZeroDivisionError):
        warnings.simplefilter("ignore", FxShareWarning)
        with place.new_place(path, force=True, ours=ours):
            raise ZeroDivisionError


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_graph_and_its_data_are_of_one_export(replacing: bool, tmp_path: Path) -> None:
    """With files that stand for what onnx writes; the graph names its data."""
    folder, kept = tmp_path / "at", tmp_path / "kept"
    for each in (folder, kept):
        each.mkdir()

    def renames(graph: Path, old: str, new: str) -> None:
        graph.write_text(graph.read_text().replace(old, new))

    def export(content: str) -> None:
        with place.new_place(folder / "m.onnx", force=True, ours=None, renames=renames) as path:
            path.with_name("m.onnx.data").write_text(content)
            path.write_text(f"{content} m.onnx.data")

    if replacing:
        export("first")
        export("old")
    ended = stops.everywhere(lambda: export("new"), folder, kept)
    assert (ended.code, ended.error) == (0, "")
    left = [folder, *sorted(kept.iterdir())]
    assert len(left) == 1 + 2 * len(ended.operations)
    for path in left:
        graph = path / "m.onnx"
        if not graph.exists():
            assert not replacing
            continue
        content, data = graph.read_text().split()
        assert content == "new" or (content == "old" and replacing and path != folder)
        assert (path / data).read_text() == content
        if path == folder or "SIGINT" in path.name:
            assert sorted(each.name for each in path.iterdir()) == sorted(["m.onnx", data])
        # and the next export removes what a killed one left
        folder = path
        export("next")
        assert len(list(path.iterdir())) == 2
        content, data = graph.read_text().split()
        assert (content, (path / data).read_text()) == ("next", "next")


@pytest.mark.slow
def test_large_weights_are_replaced_with_their_graph(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions_without_threads: None
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    target = pytest.importorskip("fxshare.exporting.targets.onnx")
    write = target.write
    monkeypatch.setattr(target, "write", lambda *given: write(*given, largest_file=0))
    folder, kept = tmp_path / "at", tmp_path / "kept"
    for each in (folder, kept):
        each.mkdir()
    path = folder / "m.onnx"
    first = stops.run(lambda: fxshare.export(models[0], path, to="onnx"), folder)
    assert (first.code, first.error) == (0, "")
    assert list(everything(folder)) == ["m.onnx", "m.onnx.data"]
    ended = stops.everywhere(
        lambda: fxshare.export(models[1], path, to="onnx", force=True), folder, kept
    )
    assert (ended.code, ended.error) == (0, "")
    names = list(everything(folder))
    assert len(names) == 2
    assert names[1] not in ("m.onnx.data", names[0])
    x = build.ids()
    expected = [model(x) for model in models]
    found = []
    for left in [*sorted(kept.iterdir()), folder]:
        session = runtime.InferenceSession(left / "m.onnx", providers=["CPUExecutionProvider"])
        feed = {put.name: x.numpy() for put in session.get_inputs()}
        output = torch.from_numpy(session.run(None, feed)[0])
        found.append([torch.allclose(output, one, atol=1e-4) for one in expected])
    assert all(sum(one) == 1 for one in found), "a mixture of two exports"
    assert found[0] == [True, False]
    assert found[-1] == [False, True]
