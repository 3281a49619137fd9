"""The benchmarks demo at small sizes and say what they measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxshare
from fxshare.bench import demo
from fxshare.bench.compress import bench_compress, lines
from fxshare.bench.demo import CONFIG
from fxshare.bench.planner import bench_planner, draw
from fxshare.bench.planner import table as planner_table
from fxshare.bench.quality import Case, bench_quality, kept_in_file
from fxshare.bench.quality import table as quality_table
from fxshare.embedded.corpus import calibration
from fxshare.embedded.model import GPT, GPTConfig
from tests.embedded.shallow import first_layers


def small_gpt() -> GPT:
    torch.manual_seed(0)
    sizes = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=32)
    return GPT(sizes).eval()


def test_compress_compares_calibration_and_factorisation_at_equal_error() -> None:
    found = bench_compress(
        layers=2, width=16, heads=2, tokens=256, length=32, batch=4, repeats=1, vocabulary=64
    )
    assert found.tokens == 256
    assert found.calibrate_over_forward > 0
    assert found.worst_error_gap < 1e-10
    assert any("of the forward" in line for line in lines(found))


def test_planner_times_synthetic_problems(tmp_path: Path) -> None:
    found = bench_planner([1, 2])
    assert [t.sites for t in found.timings] == [7, 14]
    assert all(0.79 <= t.kept <= 0.8 for t in found.timings)
    assert len(planner_table(found)[1]) == 2
    draw(found, tmp_path / "planner.svg")
    assert (tmp_path / "planner.svg").read_text("utf-8").lstrip().startswith("<?xml")


def test_quality_counts_stored_numbers_in_the_saved_file() -> None:
    model = small_gpt()
    tokens = torch.randint(0, 32, (24, 16))
    case = Case("small", model, CONFIG, tokens, tokens[:8])
    found = bench_quality([case], sizes=(0.5,), batch=4, search="off")
    assert {row.method for row in found.rows} == {"basis sharing", "whitened SVD", "planned"}
    assert all(row.kept <= 0.5 for row in found.rows)
    assert len(quality_table(found)[1]) == 1


@pytest.mark.parametrize("extra", [{}, {"budget": {"params_kept": 0.5}}])
def test_kept_in_file_is_what_the_plan_says(extra: dict[str, object]) -> None:
    model = small_gpt()
    data = [torch.randint(0, 32, (4, 16)) for _ in range(4)]
    gm = fxshare.compile(model, [CONFIG, extra], calibration=data)
    assert kept_in_file(model, gm) == pytest.approx(gm.fxshare.plan.params_kept, rel=1e-12)


def test_the_demo_shows_dense_exact_sharing_and_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one size, two layers, and attention only: the wide matrices take most of the time
    types = {k: v for k, v in CONFIG["weight_types"].items() if k.startswith("attn")}
    monkeypatch.setattr(demo, "load_embedded", lambda: first_layers(2))
    monkeypatch.setattr(demo, "calibration", lambda docs, n_bytes: calibration(docs, n_bytes=8_000))
    monkeypatch.setattr(demo, "SIZES", (0.5,))
    monkeypatch.setattr(demo, "CONFIG", {**CONFIG, "weight_types": types})
    found = demo.demo(quick=True, out=tmp_path)
    by_name = {row.name: row for row in found.rows}
    assert list(by_name) == ["dense", "exact", "basis sharing 0.50", "planned 0.50"]
    assert by_name["exact"].bits_per_byte == pytest.approx(by_name["dense"].bits_per_byte, abs=1e-6)
    assert by_name["planned 0.50"].bits_per_byte < by_name["basis sharing 0.50"].bits_per_byte
    assert by_name["planned 0.50"].params_kept <= 0.5
    assert (tmp_path / "demo.md").exists()
    assert (tmp_path / "demo.json").exists()
