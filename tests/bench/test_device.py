"""``fxshare bench device``: constants of this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fxshare.bench.speed.device import bench_device, table, threads
from fxshare.cli import main
from fxshare.cost_model.device import rates_for, rates_of_model
from fxshare.errors import ConfigError, FxShareWarning

SMALL = {"widths": (16, 64), "working_sets": (1 << 16, 1 << 18), "repeats": 1}


def test_constants_are_positive_and_in_order() -> None:
    before = torch.get_num_threads()
    with threads(1):
        found = bench_device(dtype="float64", compiled=False, **SMALL)  # type: ignore[arg-type]
    assert torch.get_num_threads() == before
    assert (found.dtype, found.threads, found.element_size) == ("float64", 1, 8)
    assert [n for n, _ in found.matmul] == [16, 64]
    assert all(rate > 1e6 for _, rate in (*found.matmul, *found.bandwidth))
    assert 0 < found.launch == found.launch_compiled < 0.01
    assert found.entry == 0  # nothing was compiled
    assert len(table(found)[1]) == 7


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        def run(x: object) -> object:
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(FxShareWarning, match="no C\\+\\+ compiler"):
        found = bench_device(**SMALL)  # type: ignore[arg-type]
    assert found.launch_compiled == found.launch
    assert found.entry == 0


def test_entering_a_compiled_pass_is_no_part_of_its_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("_WIDTH", 8), ("_BLOCKS", 2)):
        monkeypatch.setattr(f"fxshare.bench.speed.device.{name}", value)

    def compiled(module: Any, **options: object) -> object:
        def run(x: object) -> object:
            spent = time.thread_time() + 0.004
            while time.thread_time() < spent:
                pass
            return module(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    with threads(1):
        found = bench_device(**SMALL)  # type: ignore[arg-type]
    assert 0.004 <= found.entry < 0.008
    # of two blocks, with nothing in them: as eager ones, and no part of the entry's
    assert found.launch <= found.launch_compiled < 0.0004


def test_the_command_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fxshare.bench.speed.device.WORKING_SETS", (1 << 16,))
    monkeypatch.setattr("fxshare.bench.speed.device.WIDTHS", (16,))
    assert rates_for(torch.device("cpu"), torch.float32) is None
    assert main(["bench", "device", "--repeats", "1", "--no-compiled"]) == 0
    assert "launch, eager" in capsys.readouterr().out
    found = rates_of_model(torch.nn.Linear(2, 2))
    assert found is not None
    assert found == rates_of_model(torch.nn.Linear(2, 2, device="meta"))
    assert rates_of_model(torch.nn.Linear(2, 2).bfloat16()) is None


def test_the_shapes_of_a_model_are_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fxshare.bench.speed.device.WORKING_SETS", (1 << 16,))
    monkeypatch.setattr("fxshare.bench.speed.device.WIDTHS", (16,))
    monkeypatch.setattr("fxshare.bench.speed.shapes._SET", 1 << 16)
    monkeypatch.setattr("fxshare.bench.speed.shapes.SHARES", (0.5,))
    given = ["bench", "device", "--repeats", "1", "--no-compiled"]
    assert main([*given, "--shape", "16,1,2,32", "--batch", "1,3", "--prompt", "4"]) == 0
    assert "products and attentions of models" in capsys.readouterr().out
    found = rates_for(torch.device("cpu"), torch.float32)
    assert found is not None
    keys = {key for key, _ in found.measured.products}
    assert {rows for rows, _, _ in keys} == {1, 3, 4, 12}
    # dense, a basis, its coefficient and the table of a pivoted one, of the fused projection
    assert {(1, 16, 48), (1, 16, 8), (1, 8, 48), (1, 8, 8)} <= keys
    assert {key[:3] for key, _ in found.measured.attentions} == {
        (2 * batch, tokens, tokens) for batch in (1, 3) for tokens in (1, 4)
    }
    assert main(given) == 0  # the constants again; what was measured of models stays
    again = rates_for(torch.device("cpu"), torch.float32)
    assert again is not None
    assert again.measured == found.measured


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["embedded", "--batch", "1,x"], "--batch: expected numbers from 1"),
        (["embedded", "--shape", "16,1,2,32"], "--shape: makes a model of its own"),
        (["--batch", "8"], "--batch: is of the products of a model; give MODEL or --shape"),
        (["--prompt", "64"], "--prompt: is of the products of a model; give MODEL or --shape"),
        (["torch.nn:Identity"], "Identity: expected a model that reads token ids"),
    ],
)
def test_shapes_that_cannot_be_measured(
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxshare.bench.speed.device.WORKING_SETS", (1 << 16,))
    monkeypatch.setattr("fxshare.bench.speed.device.WIDTHS", (16,))
    assert main(["bench", "device", "--repeats", "1", "--no-compiled", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        pytest.param(
            {"device": "cuda"},
            "no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_devices_and_dtypes_that_are_not_there(keys: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bench_device(**keys)  # type: ignore[arg-type]
