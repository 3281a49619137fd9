"""Models that draw from generators: each call of ours leaves every library's as it was."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base import randomness
from fxshare.base.randomness import randomness_as_before
from tests.strategies import no_warnings_of_ours

WIDTH, VOCABULARY = 8, 20
CONFIG: dict[str, Any] = {
    "weight_types": {"a": {"pattern": r"layers\.\d+$"}},
    "block_pattern": r"layers\.(\d+)",
}
BUDGET = {"budget": {"params_kept": 0.7}}


class Draws(nn.Module):
    """Draws in every call, and does not say what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        drawn = random.gauss(0, 1) + np.random.randn()
        x: Tensor = self.embed(ids) + 0.0 * (torch.rand(1) + drawn)
        for layer in self.layers:
            x = x + layer(x)
        return x


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, 6), generator=generator) for _ in range(3)]


def _states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
    }


def _made(capture: str, *more: Any) -> Any:
    torch.manual_seed(0)
    with no_warnings_of_ours():
        return fxshare.compile(
            Draws().eval(), [CONFIG, *more], calibration=_data(), capture=capture, seed=1
        )


CALLS: dict[str, Callable[[nn.Module, Any, Path], object]] = {
    "propose": lambda model, gm, path: fxshare.propose(model, example=_data()[0]),
    "plan": lambda model, gm, path: fxshare.plan(model, [CONFIG, BUDGET], calibration=_data()),
    "compile": lambda model, gm, path: fxshare.compile(model, CONFIG, example=_data()[0]),
    "by modules": lambda model, gm, path: fxshare.compile(
        model, [CONFIG, BUDGET], calibration=_data(), capture="modules"
    ),
    "torch.export": lambda model, gm, path: fxshare.compile(
        model, CONFIG, example=_data()[0], capture="export"
    ),
    "verify": lambda model, gm, path: fxshare.verify(model, gm, _data()),
    "lower": lambda model, gm, path: fxshare.lower(gm, example=_data()[0]),
    "save and load": lambda model, gm, path: (
        fxshare.save(gm, path / "m"),
        fxshare.load(path / "m", model=Draws),
    ),
    "export py": lambda model, gm, path: fxshare.export(gm, path / "m", to="py"),
    "export pt2": lambda model, gm, path: fxshare.export(gm, path / "m.pt2", to="pt2"),
    "export dense": lambda model, gm, path: fxshare.export(
        gm, path / "m", to="dense", original=Draws
    ),
}


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any]:
    with torch.random.fork_rng():
        gm = _made("fx")
        torch.manual_seed(0)
        return Draws().eval(), gm


@pytest.mark.parametrize("name", CALLS)
def test_every_generator_is_as_it_was(
    name: str, pair: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    random.gauss(0, 1)  # the next one is at hand already, which is part of the state
    before = _states()
    with no_warnings_of_ours():
        CALLS[name](*pair, tmp_path)
    after = _states()
    assert [which for which in before if after[which] != before[which]] == []


def wait_for_workers() -> None:
    """A worker that has handed over its result takes a moment until it waits for work."""
    for _ in range(1000):
        if randomness._alone():
            return
        time.sleep(0.01)
    pytest.fail("a thread is at work, or not known to wait")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Its worker has had work, and waits."""
    with ThreadPoolExecutor(1) as made:
        made.submit(random.random).result()
        wait_for_workers()
        yield made


def _draw() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def test_a_worker_without_work_draws_nothing(pool: ThreadPoolExecutor) -> None:
    before = _states()
    with randomness_as_before(seed=1):
        _draw()
        pool.submit(_draw).result()  # ours: nobody else can have asked for it
        wait_for_workers()
    assert _states() == before


@pytest.mark.parametrize("ends", [False, True])
def test_numbers_that_a_worker_drew_are_not_drawn_again(
    ends: bool, pool: ThreadPoolExecutor
) -> None:
    here, on = threading.Event(), threading.Event()

    def work() -> tuple[float, float]:
        here.set()
        on.wait(60)
        return _draw()

    drawn = pool.submit(work)
    assert here.wait(60)
    with randomness_as_before(seed=1):
        if ends:  # at the end of our run it waits for work again
            on.set()
            drawn.result()
            wait_for_workers()
    on.set()
    assert not set(drawn.result()) & set(_draw())


def test_numbers_of_a_worker_that_we_left_at_work_are_not_drawn_again(
    pool: ThreadPoolExecutor,
) -> None:
    here, on = threading.Event(), threading.Event()

    def work() -> tuple[float, float]:
        numbers = _draw()
        here.set()
        on.wait(60)
        return numbers

    with randomness_as_before():
        drawn = pool.submit(work)
        assert here.wait(60)
    on.set()
    assert not set(drawn.result()) & set(_draw())


def test_work_that_nobody_has_begun_is_another_threads(pool: ThreadPoolExecutor) -> None:
    on, interval = threading.Event(), sys.getswitchinterval()
    sys.setswitchinterval(30)  # nobody takes the interpreter from us
    try:
        before = random.getstate()
        pool.submit(on.wait, 60)
        with randomness_as_before(seed=1):
            assert random.getstate() == before
    finally:
        sys.setswitchinterval(interval)
        on.set()
