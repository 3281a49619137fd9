"""Writing that is stopped before an operation on files: what was there, or what was to be there,
whole, and the next run clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fxshare.base import unfinished
from fxshare.base.cache import read_entry, write_entry
from fxshare.base.exchange import exchange
from fxshare.base.files import aside, swap_in, write_text
from fxshare.errors import FxShareWarning, StoreError
from tests import stops

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
SIGNALS = [signal.SIGKILL, signal.SIGINT]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _folder(path: Path, content: str) -> None:
    with aside(path) as new:
        for name in ("a", "b"):
            (new / name).write_text(content)
        (new / "inner").mkdir()
        (new / "inner" / "c").write_text(content)
        swap_in(new, path)


def _entry(path: Path, content: str) -> None:
    write_entry(path.parent, path.name, content.encode())


@dataclass(frozen=True)
class Case:
    """A way of writing, and the most that is left beside a killed one."""

    write: Callable[[Path, str], None]
    exchanging: bool = True


CASES = {
    "file": Case(write_text),
    "cache": Case(_entry),
    "folder": Case(_folder),
    "folder in two steps": Case(_folder, exchanging=False),
}


@pytest.mark.parametrize("how", SIGNALS, ids=["kill", "interrupt"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_stopped_before_every_operation(
    case: Case, replacing: bool, how: signal.Signals, tmp_path: Path
) -> None:
    def prepared(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if replacing:
            case.write(folder / "out", "old")
        return folder

    def work(folder: Path) -> Callable[[], None]:
        def done() -> None:
            warnings.simplefilter("ignore", FxShareWarning)
            case.write(folder / "out", "new")

        return done

    whole = prepared("whole")
    old = everything(whole)
    ended = stops.run(work(whole), whole, exchanging=case.exchanging)
    assert (ended.code, ended.error) == (0, "")
    new = everything(whole)
    assert new != old
    assert len(ended.operations) >= 2, "the operations are not seen"
    for at in range(len(ended.operations)):
        folder = prepared(str(at))
        stopped = stops.run(work(folder), folder, at=at, how=how, exchanging=case.exchanging)
        assert (stopped.code, stopped.error) == (-9 if how == signal.SIGKILL else 130, "")
        if how == signal.SIGINT:
            assert everything(folder) in (old, new), f"{at}: {ended.operations[at]}"
        else:
            _settled_as_old_or_new(folder, old, new, two_steps=not case.exchanging)
        again = stops.run(work(folder), folder, exchanging=case.exchanging)
        assert (again.code, again.error) == (0, "")
        assert everything(folder) == new, f"{at}: {ended.operations[at]}"
        assert [path.name for path in folder.iterdir()] == ["out"], "something is left"


def _settled_as_old_or_new(
    folder: Path, old: dict[str, bytes], new: dict[str, bytes], *, two_steps: bool
) -> None:
    seen = {n: c for n, c in everything(folder).items() if not n.startswith(".")}
    if not two_steps:
        assert seen in (old, new)
    copy = folder.with_name(folder.name + " settled")
    subprocess.run(["cp", "-r", folder, copy], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        unfinished.settle(copy / "out")
    assert everything(copy) in (old, new)
    assert [path.name for path in copy.iterdir()] in ([], ["out"])


def test_a_replacement_that_was_broken_off_is_finished_and_said(tmp_path: Path) -> None:
    path = tmp_path / "out"
    _folder(path, "old")
    said = []
    for at in range(100):
        ended = stops.run(lambda: _folder(path, "new"), tmp_path, at=at, exchanging=False)
        if ended.code == 0:
            break
        if not path.exists():
            assert ended.operations[-1].startswith("os.rename")
            with pytest.warns(FxShareWarning) as caught:
                unfinished.settle(path)
            said += [str(one.message) for one in caught]
            assert (path / "a").read_text() == "new"
            _folder(path, "old")
        elif any(each.name.endswith(".ready") for each in tmp_path.iterdir()):
            with pytest.warns(FxShareWarning, match="the older one stays"):
                unfinished.settle(path)
            assert (path / "a").read_text() == "old"
        else:
            unfinished.settle(path)
            _folder(path, "old")
        assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert len(said) == 1
    assert "earlier run ended in the middle of replacing it" in said[0]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with aside(path) as new:
        (new / "a").write_text("mine")
        stops.run(lambda: write_text(path.with_name("other"), "x"), tmp_path)
        assert stops.run(lambda: unfinished.settle(path), tmp_path).code == 0
        assert (new / "a").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    mine = unfinished.hidden(tmp_path / "out", unfinished.PARTIAL)
    host, pid, started, digits = mine.name.split(".")[2].split("-")
    assert int(pid, 16) == os.getpid()
    for earlier, left in ((0, True), (1, False)):
        then = int(started, 16) - earlier
        one = tmp_path / f".out.{host}-{pid}-{then:x}-{digits}.partial"
        one.mkdir()
        unfinished.settle(tmp_path / "out")
        assert one.exists() == left
    elsewhere = "0" * 6 if host != "0" * 6 else "1" * 6
    foreign = tmp_path / f".out.{elsewhere}-{pid}-1-{digits}.partial"
    foreign.mkdir()
    other = tmp_path / f".out.more.{host}-{pid}-1-{digits}.partial"
    other.mkdir()
    unfinished.settle(tmp_path / "out")
    assert foreign.exists(), "another machine's processes cannot be seen from here"
    assert other.exists(), "the litter of another name"


def test_a_process_that_ended_and_nobody_looked_at(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fxshare.base import unfinished as u; "
        "u.hidden(Path(sys.argv[1]), u.PARTIAL).mkdir(); os.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert len(list(tmp_path.iterdir())) == 1
    unfinished.settle(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    child.wait()


def test_the_litter_of_any_key_goes_with_the_next_entry(tmp_path: Path) -> None:
    ended = stops.run(lambda: write_entry(tmp_path, "one", b"1"), tmp_path, at=2)
    assert ended.code == -9
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    write_entry(tmp_path, "two", b"2")
    assert [p.name for p in tmp_path.iterdir()] == ["two"]
    assert read_entry(tmp_path, "two") == b"2"


def test_names_are_exchanged_where_the_file_system_can(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("not on this file system")
    assert (tmp_path / "a").read_text() == "b"
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_failing_second_step_undoes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    _folder(path, "old")
    monkeypatch.setattr("fxshare.base.files.exchange", lambda *_: False)
    real = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self.suffix == ".ready":
            raise OSError(28, "No space left on device")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StoreError, match="No space left"):
        _folder(path, "new")
    assert (path / "a").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
