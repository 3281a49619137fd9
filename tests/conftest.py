"""Options of the test suite, and what every test may ask for.

The processor's cores are divided among the workers of ``-n``; with ``OMP_NUM_THREADS=4`` in the
environment each worker, and every process that it starts, has four threads instead.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import fx

from passes import Applied, Pass, dialect, runner

_TESTS = Path(__file__).resolve().parent
_WHOLE = ("tests/exporting/test_ort_genai.py", "tests/exporting/test_vllm.py")


def pytest_configure(config: pytest.Config) -> None:
    # Workers side by side, each with a thread per core, wait for one another at every barrier: the
    # suite took several times as long. Workers and the processes that tests start inherit the
    # variable, so all of them compute with one number of threads: another number adds in another
    # order.
    workers = config.getoption("numprocesses", None) or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    os.environ["OMP_NUM_THREADS"] = threads
    torch.set_num_threads(int(threads))
    # Inductor keeps a graph's kernels on disk under a key that leaves out how wide the vectors are
    # for which it wrote them. A process with ATEN_CPU_CAPABILITY=avx2 (or on another processor with
    # the same /tmp) took loops in steps of 16 numbers and ran them with vectors of 8: off by 1.1 of
    # the largest value; the other way round they wrote past the end and free() aborted. The tag is
    # in the key. A cache for each session would be as right, and compiles for 17 s more each time.
    tag = f"tests of fxshare, {torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = torch.compiler.config.cache_key_tag = tag


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = set(_slow())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
            listed.remove(item.nodeid)
    whole = [Path(argument).resolve() for argument in config.args] == [_TESTS]
    # a file whose library is missing here has no tests at all
    files = {_file_of(item.nodeid) for item in items}
    gone = [
        name
        for name in listed
        if _file_of(name) in files or not (_TESTS.parent / _file_of(name)).exists()
    ]
    if whole and gone:
        raise pytest.UsageError(f"tests/slow.txt: there is no test {min(gone)!r} any more")
    # workers take from the end of one another's tests: files in which one fixture takes most of the
    # time stay with one worker
    items.sort(key=lambda item: _file_of(item.nodeid) not in _WHOLE)


def _file_of(name: str) -> str:
    return name.partition("::")[0]


def _slow() -> Iterator[str]:
    for line in (_TESTS / "slow.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line


def pytest_collection_finish() -> None:
    # Libraries import a million objects that stay, and graphs are made of cycles: to look at all of
    # them whenever a few hundred were made took a tenth of the suite's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files from what the code gives now, instead of comparing",
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``golden/<name>.txt`` beside the test; ``--update-golden`` writes it."""
    folder = Path(request.path).parent / "golden"

    def check(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        text = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path.name} is missing: run pytest --update-golden and read it"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session", autouse=True)
def _no_constants_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `fxshare bench device` measured here does not decide what a test prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _every_pass_keeps_the_dialect(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a test runs: a pass of ours leaves what is legal at its stage.

    ``broken_graphs`` marks tests that hand our passes graphs which are not.
    """
    if request.node.get_closest_marker("broken_graphs"):
        return
    apply = runner._apply

    def checked(gm: fx.GraphModule, one: Pass) -> Applied:
        applied = apply(gm, one)
        if type(one).__module__.startswith("passes."):
            dialect.watch(one, gm)
        return applied

    monkeypatch.setattr(runner, "_apply", checked)
