"""The benchmarks demo at small sizes and say what they measured."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxshare
from fxshare.bench import demo
from fxshare.bench.compress import bench_compress, lines
from fxshare.bench.demo import CONFIG
from fxshare.bench.planner import bench_planner, draw
from fxshare.bench.planner import table as planner_table
from fxshare.bench.quality import Case, bench_quality, kept_in_file
from fxshare.bench.quality import table as quality_table
from fxshare.bench.quality_plot import curves
from fxshare.bench.quality_plot import draw as draw_quality
from fxshare.cli import main
from fxshare.embedded.corpus import calibration
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import ConfigError, FxShareWarning
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


@pytest.mark.parametrize("command", [["planner"], ["run"], ["scale"], ["quality"]])
def test_a_picture_that_could_not_be_written_is_refused_before_anything_runs(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = ("planner.bench_planner", "speed.run.bench_run", "scale.run.bench_scale")
    for name in (*runs, "quality.bench_quality"):
        monkeypatch.setattr(f"fxshare.bench.{name}", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    plot = tmp_path / "file" / "a.svg"
    assert main(["bench", *command, "--quiet", "--plot", str(plot)]) == 1
    assert f"cannot write {plot}" in capsys.readouterr().err


def test_quality_counts_stored_numbers_in_the_saved_file() -> None:
    model = small_gpt()
    tokens = torch.randint(0, 32, (24, 16))
    case = Case("small", model, CONFIG, tokens, tokens[:8])
    found = bench_quality([case], sizes=(0.5,), batch=4, search="off")
    assert {row.method for row in found.rows} == {"basis sharing", "whitened SVD", "planned"}
    assert all(row.kept <= 0.5 for row in found.rows)
    assert len(quality_table(found)[1]) == 1


def test_quality_refines_on_calibration_tokens_at_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_gpt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    tokens = torch.randint(0, 32, (24, 16))
    case = Case("small", model, CONFIG, tokens, torch.randint(0, 32, (8, 16)))
    sizes, seen = [], []

    def watched(gm: Any, model: Any, batches: Any, **options: Any) -> Any:
        result = fxshare.refine(gm, model, batches, steps=12, **options)
        sizes.append([kept_in_file(model, one) for one in (gm, result)])
        seen.append(torch.cat(batches))
        return result

    monkeypatch.setattr("fxshare.bench.refined.refine", watched)
    found = bench_quality([case], sizes=(0.5, 0.3), batch=4, search="off", refine=0.2)
    refined = {row.method: row.refined for row in found.rows if row.refined is not None}
    assert set(refined) == {"basis sharing", "planned"}
    assert all(one.tokens == one.steps * 4 * 16 > 0 for one in refined.values())
    assert all(one.seconds > 0 for one in refined.values())
    assert len(sizes) == 4
    assert all(before == after <= 0.5 for before, after in sizes)
    assert all(torch.equal(one, case.calibration) for one in seen)
    better = [r for r in found.rows if r.refined is not None and r.refined.increase < r.increase]
    assert better, found.rows
    header, rows = quality_table(found)
    assert "planned refined" in header
    assert all(len(row) == len(header) for row in rows)
    points = curves(found, "small")
    assert set(points) == {
        "basis sharing", "basis sharing, refined", "whitened SVD", "planned", "planned, refined"
    }  # fmt: skip
    assert [kept for kept, _ in points["planned"]] == [
        kept for kept, _ in points["planned, refined"]
    ]
    draw_quality(found, tmp_path / "quality.svg")
    assert (tmp_path / "quality.svg").read_text("utf-8").lstrip().startswith("<?xml")


def test_minutes_that_cannot_be_meant_are_refused_before_anything_is_compiled() -> None:
    tokens = torch.randint(0, 32, (8, 16))
    case = Case("none", torch.nn.Identity(), CONFIG, tokens, tokens)
    with pytest.raises(ConfigError, match="minutes: expected a number above 0, found -1"):
        bench_quality([case], refine=-1.0)


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
    monkeypatch.setattr(demo, "REFINE_SECONDS", 0.5)
    found = demo.demo(quick=True, refine=True, out=tmp_path)
    by_name = {row.name: row for row in found.rows}
    names = ["dense", "exact", "basis sharing 0.50", "planned 0.50", "planned 0.50 refined"]
    assert list(by_name) == names
    assert by_name["planned 0.50 refined"].parameters == by_name["planned 0.50"].parameters
    assert by_name["exact"].bits_per_byte == pytest.approx(by_name["dense"].bits_per_byte, abs=1e-6)
    assert by_name["planned 0.50"].bits_per_byte < by_name["basis sharing 0.50"].bits_per_byte
    assert by_name["planned 0.50"].params_kept <= 0.5
    assert (tmp_path / "demo.md").exists()
    assert (tmp_path / "demo.json").exists()


def test_encoder_compares_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **shape, intermediate_size=32, vocab_size=260, initializer_range=0.3
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 260, (24, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16)[None] < torch.arange(1, 25)[:, None]
    save_file({"ids": ids, "attention_mask": mask.long()}, tmp_path / "a.safetensors")
    spec = f"{tmp_path}/a.safetensors:ids"
    data = ["--calibration", spec, "--data", spec, "--samples", "20", "--texts", "9"]
    command = ["bench", "encoder", str(tmp_path / "model"), *data, "--json", "--quiet"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        refining = ["--refine", "0.01", "--refine-samples", "24", "--kinds", "basis,units"]
        assert main([*command, "--sizes", "1.0,0.5", "--search", "off", *refining]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 9
    for row in found["rows"]:
        assert (row["refined"] is None) == (row["method"] == "whitened SVD" or row["size"] == 1)
        assert row["refined"] is None or row["refined"]["tokens"] > 0
    rows = {(row["size"], row["method"]): row for row in found["rows"]}
    for method in ("basis sharing", "whitened SVD", "planned"):
        assert rows[0.5, method]["params_kept"] <= 0.5
        assert -1 <= rows[0.5, method]["lowest"] <= rows[0.5, method]["cosine"] < 1 - 1e-6
    # at the dense size the plan has nothing to do
    assert rows[1.0, "planned"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert rows[0.5, "planned"]["cosine"] > rows[0.5, "basis sharing"]["cosine"]
