"""What a capture does beside other threads and forked processes: nothing that they notice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.capture import capture, quiet
from fxshare.capture.tracing.factories import TRACE_LOCK


class _Waiting(nn.Module):
    """Stops in the middle of a trace until it is let go."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.__dict__["stop"] = stop

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        made = _Waiting(self.__dict__["stop"])
        made.fc = self.fc
        return made

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            self.__dict__["stop"]()
        return torch.relu(self.fc(x))


@contextmanager
def _in_the_middle_of_a_trace() -> Iterator[None]:
    here, on = threading.Event(), threading.Event()

    def stop() -> None:
        here.set()
        on.wait(60)

    model = _Waiting(stop)
    thread = threading.Thread(target=lambda: capture(model, torch.randn(2, 4), mode="fx"))
    thread.start()
    try:
        assert here.wait(60)
        yield
    finally:
        on.set()
        thread.join()


def test_the_fused_encoder_path_stays_on_for_others() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with _in_the_middle_of_a_trace():
        assert torch.backends.mha.get_fastpath_enabled()
        with torch.profiler.profile() as profile, torch.inference_mode():
            layer(x)
        assert any("_transformer_encoder_layer_fwd" in event.name for event in profile.events())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled.__module__ == "torch.backends.mha"


def test_what_others_set_about_it_holds() -> None:
    try:
        with _in_the_middle_of_a_trace():
            torch.backends.mha.set_fastpath_enabled(False)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_in_a_capture_can_capture() -> None:
    with _in_the_middle_of_a_trace():
        assert not TRACE_LOCK.acquire(blocking=False)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                gm = capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), mode="fx").graph
                status = 0 if any(node.op == "call_module" for node in gm.graph.nodes) else 2
            finally:
                os._exit(status)
        for _ in range(600):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
    assert os.waitstatus_to_exitcode(status) == 0


class _Noisy(nn.Module):
    """Draws in eval mode too, in ways with and without a generator of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + torch.randn_like(x) + torch.rand(4) + torch.randperm(4)
        return torch.nn.functional.rrelu(torch.nn.functional.dropout(y, 0.5), training=True)


@pytest.mark.parametrize("mode", ["fx", "export", "modules"])
def test_no_number_is_drawn_twice_beside_a_compilation(mode: Any) -> None:
    stop, drawing = threading.Event(), threading.Event()
    found: list[tuple[float, float, float]] = []

    def draw() -> None:
        while not stop.wait(1e-4):
            one = torch.rand(1, dtype=torch.float64).item()
            found.append((one, random.random(), np.random.rand()))
            drawing.set()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert drawing.wait(60)  # on a busy machine a compilation may end before a thread begins
        cfg = {"weight_types": {"fc": {"pattern": "fc|0"}}}
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        fxshare.compile(model, cfg, example=torch.randn(2, 4), capture=mode)
    finally:
        stop.set()
        thread.join()
    assert found
    for numbers in zip(*found, strict=True):
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_run_of_ours_draws_as_before_and_leaves_no_trace(seed: int | None) -> None:
    model, x = _Noisy(), torch.randn(2, 3, 4)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with quiet(seed):
        found = model(x), random.random()
    with quiet(seed):
        again = model(x), random.random()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert torch.equal(found[0], again[0])
    assert found[1] == again[1]
    if seed is not None:
        torch.manual_seed(seed)
    assert torch.equal(model(x), found[0])
