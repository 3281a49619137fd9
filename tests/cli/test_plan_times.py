"""``fxshare plan`` says how long a plan takes, where the device was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxshare.cost_model import write_rates
from fxshare.cost_model.device import device_name
from tests.cli.conftest import Ran
from tests.cost_model.test_cost_model import SLOW

Run = Callable[..., Ran]
COMMAND = ("plan", "cli_toy:make", "-c", "sharing.yaml", "--set")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(cache: Path) -> Path:
    here = replace(SLOW, name=device_name(torch.device("cpu")), threads=torch.get_num_threads())
    return write_rates(replace(here, launch=1e-9, launch_compiled=1e-9))


def test_without_constants_it_says_how_to_get_them(fxshare: Run, cache: Path) -> None:
    ran = fxshare(*COMMAND, "compression_rate=0.8")
    assert ran.code == 0, ran.err
    command = f"fxshare bench device --dtype float32 --threads {torch.get_num_threads()}"
    assert f"times: this device was not measured; after '{command}'" in ran.out
    assert list(cache.iterdir()) == []


def test_dense_stands_beside_the_plan(fxshare: Run, measured: Path) -> None:
    ran = fxshare(*COMMAND, "compression_rate=0.5")
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines() if line.startswith(("prefill", "decode"))]
    assert len(rows) == 8
    linears, whole = ([r for r in rows if what in " ".join(r)] for what in ("linears", "the model"))
    assert len(linears) == len(whole) == 4
    # a head and a residual stream that stay as they are
    for part, all_of_it in zip(linears, whole, strict=True):
        assert 1 < float(all_of_it[-1]) < float(part[-1])
    assert "slower" not in ran.err


def test_a_slow_plan_is_a_warning(fxshare: Run, measured: Path) -> None:
    ran = fxshare(*COMMAND, "compression_rate=1.2")
    assert ran.code == 0, ran.err
    assert "warning: the plan is predicted to be slower than dense: prefill eager 0." in ran.err
    assert "slower" not in ran.out


def test_the_exact_mode_has_no_times(fxshare: Run, measured: Path) -> None:
    both = ("group_size=null", "--set", "compression_rate=null")
    assert "time per token" not in fxshare(*COMMAND, *both).out
