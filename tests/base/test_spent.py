"""What stages take: their own seconds and no others', and nothing where nobody records."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fxshare.base.spent as module
from fxshare.base.progress import stage
from fxshare.base.spent import OTHER, Spent, part, peak_bytes, recording

LOG = logging.getLogger("fxshare.test")


def busy(seconds: float) -> None:
    """Use the processor for so long, whatever else the machine does."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def by_name(stages: tuple[Spent, ...]) -> dict[str, Spent]:
    return {one.name: one for one in stages}


def test_each_stage_has_its_own_seconds_and_the_sum_is_the_whole() -> None:
    start = time.process_time()
    with recording() as spent:
        with stage("outer", LOG):
            busy(0.05)
            for _ in range(3):
                with part("inner"):
                    busy(0.02)
            busy(0.01)
        busy(0.03)
    whole = time.process_time() - start
    stages = spent.stages()
    assert [(one.name, one.runs) for one in stages] == [("outer", 1), ("inner", 3), (OTHER, 1)]
    found = by_name(stages)
    # ours run until so much time has passed, and beyond it by a step of the loop
    for name, least in (("outer", 0.06), ("inner", 0.06), (OTHER, 0.03)):
        assert least <= found[name].cpu_seconds < least + 0.02
        assert found[name].seconds >= found[name].cpu_seconds - 0.01
    assert sum(one.cpu_seconds for one in stages) == pytest.approx(whole, abs=2e-3)


def test_a_whole_part_counts_what_is_inside_and_parts_are_decorators() -> None:
    @part("judge")
    def judge() -> None:
        busy(0.01)

    with recording() as spent:
        judge()
        with part("slope", whole=True):
            judge()
            with part("anything"):
                judge()
        judge()
    found = by_name(spent.stages())
    assert set(found) == {"judge", "slope", OTHER}
    assert found["judge"].runs == 2
    assert found["slope"].runs == 1
    assert found["slope"].cpu_seconds >= 0.02


def test_a_part_that_an_error_ends_is_ended() -> None:
    with recording() as spent:
        with pytest.raises(KeyboardInterrupt), part("work"):
            raise KeyboardInterrupt
        busy(0.02)
    found = by_name(spent.stages())
    assert found["work"].runs == 1
    assert found["work"].cpu_seconds < 0.01
    assert found[OTHER].cpu_seconds >= 0.02


def test_memory_is_counted_where_it_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 100, "peak": 900}

    def forget() -> None:
        held["peak"] = held["now"]

    def hold(more: int) -> None:
        held["peak"] = max(held["peak"], held["now"] + more)

    monkeypatch.setattr(module, "peak_bytes", lambda: held["peak"])
    monkeypatch.setattr(module, "_forget_peak", forget)
    with recording() as spent:
        with part("outer"):
            for more in (20, 50, 30):
                with part("large"):
                    hold(more)
                hold(5)
        held["now"] += 1
        hold(0)
    found = {one.name: one.peak_bytes for one in spent.stages()}
    assert found == {"outer": 105, "large": 150, OTHER: 101}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_a_stage_has_its_own_peak_and_not_an_earlier_ones() -> None:
    size = 1 << 27
    with recording() as spent:
        with part("before"):
            pass
        with part("large"):
            torch.ones(size, dtype=torch.uint8)
        with part("after"):
            pass
    found = by_name(spent.stages())
    # beside the tensor, little of a process comes and goes in so short a time
    for name in ("before", "after"):
        assert found["large"].peak_bytes - found[name].peak_bytes == pytest.approx(size, rel=0.25)
    with recording() as spent:
        torch.ones(size, dtype=torch.uint8)
    after = peak_bytes()
    torch.ones(2 * size, dtype=torch.uint8)
    assert peak_bytes() > after + size // 2


def test_without_files_of_the_kernel_the_peak_is_that_of_getrusage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")

    def refused(*_: object, **__: object) -> str:
        raise PermissionError

    for name in ("read_bytes", "write_text"):
        monkeypatch.setattr(Path, name, refused)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with recording() as spent, part("a"):
        found = peak_bytes()
    assert found == pytest.approx(usage * (1 if sys.platform == "darwin" else 1024), rel=0.1)
    assert by_name(spent.stages())["a"].peak_bytes == pytest.approx(found, rel=0.1)


def test_nothing_is_recorded_outside_and_recordings_do_not_mix() -> None:
    with part("before"):
        pass
    with recording() as outer:
        with part("a"), recording() as inner, part("b"):
            pass
        # another thread's stages are not this one's
        other = threading.Thread(target=lambda: part("thread").__enter__())
        other.start()
        other.join()
    with part("after"):
        pass
    assert set(by_name(outer.stages())) == {"a", OTHER}
    assert set(by_name(inner.stages())) == {"b", OTHER}
