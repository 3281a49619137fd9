"""``bench scale``: stages that add up, a process for each run, refusals before anything runs."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import fxshare
from fxshare.base.spent import OTHER
from fxshare.bench.scale import child
from fxshare.bench.scale import run as running
from fxshare.bench.scale.child import in_own_process
from fxshare.bench.scale.measure import METHODS, Job, ScaleRun, Settings, measure, types_of
from fxshare.bench.scale.run import Growth, ScaleBench, bench_scale, jobs
from fxshare.bench.scale.table import draw, lines_below, table
from fxshare.cli import main
from fxshare.errors import ConfigError, StoreError
from fxshare.models.shapes import SHAPES, ModelShape

pytest.importorskip("transformers")

TINY = "32,2,2,64,101"
SMALL = Settings(tokens=64, length=8, batch_size=2)
COMPILING = {"propose", "match", "capture", "plan", "calibrate", "factorise", "rewrite", "verify"}
PLANNING = {"moments", "search", "solve", "spectra", "factorise groups", "multiply out", "judge"}
STAGES = {
    "planned": {*COMPILING, *PLANNING, "slope"},
    "basis sharing": COMPILING,
    "forward and backward": {"forward", "backward"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScaleBench]:
    with pytest.MonkeyPatch.context() as patched:
        # estimates measure the machine and keep its rates
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield bench_scale([TINY], [2, 1], SMALL, run=measure)


def test_estimates_stand_beside_what_was_measured(found: ScaleBench) -> None:
    for run in found.runs:
        if run.method == "forward and backward":
            assert (run.estimated, run.estimated_bytes) == ((), 0)
            continue
        said = {one.name: one.seconds for one in run.estimated}
        # coefficients are fitted where they are asked for, which of one layer none is
        assert set(said) - {"refit"} <= {one.name for one in run.stages}
        assert all(seconds >= 0 for seconds in said.values())
        assert run.estimated_bytes > 0
    header, rows = table(found)
    totals = {row[1]: row for row in rows if row[2] == "total"}
    assert header[4] == "estimated"
    assert totals["forward and backward"][4] == "–"
    parts = sum(float(r[4]) for r in rows if r[1] == "planned" and r[4] != "–" and r[2] != "total")
    assert float(totals["planned"][4]) == pytest.approx(parts, abs=0.1)


def test_every_method_is_measured_at_every_number_of_layers(found: ScaleBench) -> None:
    assert [(r.layers, r.method) for r in found.runs] == [(n, m) for n in (1, 2) for m in METHODS]
    numbers = {run.layers: run.parameters for run in found.runs}
    # two embeddings and the last norm, and a layer: attention, MLP, two norms
    assert numbers == {n: 2 * 101 * 32 + 32 + n * (4 * 32**2 + 3 * 32 * 64 + 64) for n in (1, 2)}
    for run in found.runs:
        assert not run.failed
        assert min(run.model_bytes, run.peak_bytes) > 0
        if run.method == "forward and backward":
            assert run.kept is None
        else:
            assert run.kept == pytest.approx(0.8, abs=0.03)


def test_stages_are_all_there_and_add_up_to_the_whole(found: ScaleBench) -> None:
    for run in found.runs:
        names = [one.name for one in run.stages]
        assert len(set(names)) == len(names)
        assert STAGES[run.method] <= set(names)
        # a stage that counts what is inside of it as well makes this too large; two readings of the
        # clock lie between
        total = sum(one.cpu_seconds for one in run.stages)
        assert total == pytest.approx(run.cpu_seconds, rel=1e-3, abs=2e-3)
        # nothing large is in no stage: compiling a tiny model is mostly Python
        other = next(one.cpu_seconds for one in run.stages if one.name == OTHER)
        assert other < 0.2 * run.cpu_seconds + 0.02
        assert max(one.peak_bytes for one in run.stages) == run.peak_bytes
    planned = found.runs[0]
    runs = {one.name: one.runs for one in planned.stages}
    assert runs["calibrate"] == 2  # and again on a half-compressed model
    assert runs["search"] == 3
    assert runs["slope"] == 1


def test_the_result_is_the_same_after_json(found: ScaleBench) -> None:
    assert ScaleBench.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_table_has_a_row_a_stage_and_totals(found: ScaleBench) -> None:
    header, rows = table(found)
    assert header == [
        *("shape", "method", "stage"),
        *("1 layer: s", "estimated", "GB", "estimated"),
        *("2 layers: s", "estimated", "GB", "estimated"),
    ]
    assert {len(row) for row in rows} == {len(header)}
    for method in METHODS:
        mine = [row for row in rows if row[1] == method]
        assert {row[2] for row in mine[:-1]} >= STAGES[method]
        assert mine[-1][2] == "total"
        for column in (3, 7):
            # each is rounded to hundredths
            parts = sum(float(row[column]) for row in mine[:-1])
            assert parts == pytest.approx(float(mine[-1][column]), abs=0.005 * (len(mine) + 1))


def made(seconds: Sequence[tuple[int, str, float]], **rest: str) -> ScaleBench:
    runs = [ScaleRun("gpt2", n, m, cpu_seconds=s, **rest) for n, m, s in seconds]  # type: ignore[arg-type]
    facts = {"cpu": "a", "threads": 1, "torch": "2", "python": "3", "load": 0.0}
    return ScaleBench(facts, SMALL, tuple(runs))


def test_growth_is_from_each_number_of_layers_to_the_next() -> None:
    seconds = [(6, "planned", 30.0), (24, "planned", 132.0), (12, "planned", 60.0)]
    bench = made([*seconds, (12, "basis sharing", 20.0)])
    assert bench.growth == (
        Growth("gpt2", "planned", (6, 12), 2.0),
        Growth("gpt2", "planned", (12, 24), 2.2),
    )
    assert [(one.method, one.layers, one.times) for one in bench.beside] == [
        ("basis sharing", 12, 3.0)
    ]
    text = "\n".join(lines_below(bench))
    assert "planned: 24 layers take 2.20 times the processor seconds of 12 (2.00 times the" in text
    assert "12 layers: planned takes 3.00 times the processor seconds of basis sharing" in text
    plain = bench.to_dict()
    assert [one["times"] for one in plain["growth"]] == [2.0, 2.2]
    assert [one["times"] for one in plain["beside"]] == [3.0]


def test_what_failed_has_no_figures_and_says_why(tmp_path: Path) -> None:
    good = made([(2, "planned", 4.0), (2, "basis sharing", 1.0)])
    bad = made([(4, "planned", 0.0), (4, "basis sharing", 0.0)], failed="out of luck")
    bench = replace(good, runs=(*good.runs, *bad.runs))
    assert not bench.growth
    assert [one.layers for one in bench.beside] == [2]
    rows = {tuple(row[1:3]): row[3:] for row in table(bench)[1]}
    assert rows["planned", "total"][0] == "4.00"
    assert rows["planned", "total"][4:] == ["–"] * 4
    assert "failed: gpt2, 4 layers, planned: out of luck" in lines_below(bench)
    draw(bench, tmp_path / "scale.svg")
    draw(bad, tmp_path / "none.svg")


def test_the_picture_has_a_line_a_method(found: ScaleBench, tmp_path: Path) -> None:
    draw(found, tmp_path / "scale.svg")
    text = (tmp_path / "scale.svg").read_text("utf-8")
    assert text.lstrip().startswith("<?xml")
    for method in METHODS:
        assert f"<!-- {TINY}, {method} -->" in text


def test_a_shape_without_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asked for it: estimates take shapes too."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"a model of a shape .* pip install 'fxshare\[hf\]'"):
        ModelShape.parse("tinyllama").model(torch.bfloat16)


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_the_published_ones(name: str) -> None:
    numbers = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "tinyllama": 1_100_048_384,
        "llama-7b": 6_738_415_616,
        "llama-70b": 68_976_648_192,
        "llama-405b": 405_853_388_800,
    }
    assert ModelShape.parse(name).parameters() == numbers[name]


def test_a_model_is_born_in_its_dtype_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = ModelShape.parse(TINY).model(torch.bfloat16)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    same = ModelShape.parse(TINY).model(torch.bfloat16)
    other = ModelShape.parse(TINY).model(torch.bfloat16, seed=1)
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, same.state_dict()["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(weight, other.state_dict()["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(("split", "slices"), [("heads", 6), ("qkv", 3), ("false", 1)])
def test_a_fused_projection_is_split_as_asked(split: str, slices: int) -> None:
    gpt2 = replace(SHAPES["gpt2"], width=16, heads=2, ffn=32, vocabulary=99, layers=1, context=8)
    model = gpt2.model(torch.float32)
    plan = fxshare.plan(model, types_of(model, split))
    counts = [len(site.slices) for site in plan.sites if site.name.endswith("c_attn")]
    assert counts == [slices]
    llama = ModelShape.parse(TINY).model(torch.float32)
    assert types_of(llama, split) == types_of(llama, "heads")


# in a process of its own -----------------------------------------------------------------------


def test_a_run_in_its_own_process_has_its_own_peak() -> None:
    job = Job(TINY, 2, "forward and backward", SMALL)
    # a process has the resident memory of the one that starts it counted in its ru_maxrss
    hold = torch.ones(1 << 29, dtype=torch.uint8)
    own = in_own_process(job)
    here = measure(job)
    del hold
    assert not own.failed
    assert own.parameters == here.parameters
    assert [one.name for one in own.stages] == [one.name for one in here.stages]
    assert own.peak_bytes < here.peak_bytes - (1 << 28)


def ordered(monkeypatch: pytest.MonkeyPatch, order: dict[str, object]) -> None:
    """``child.main`` will read this order, and leaves logging and threads of this process alone."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(order)))
    monkeypatch.setattr(child, "logging", mock.MagicMock())
    monkeypatch.setattr(child, "_LOG", mock.MagicMock())
    monkeypatch.setattr(child, "threading", mock.MagicMock())


def test_an_error_in_the_process_is_said_in_the_result(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    order = {"shape": "gpt3", "layers": 1, "method": "planned", "settings": {}, "level": 30}
    ordered(monkeypatch, order)
    child.main()
    said = ScaleRun.from_dict(json.loads(capfd.readouterr().out))
    assert "shape: expected gpt2" in said.failed
    assert not said.stages


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "where memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", f"signal {signal.SIGTERM:d}"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_process_that_ends_early_says_how(
    code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_COMMAND", ("-c", code))
    ended = in_own_process(Job(TINY, 2, "planned", SMALL))
    assert reason in ended.failed
    assert (ended.layers, ended.method, ended.stages) == (2, "planned", ())


def test_a_process_that_nobody_waits_for_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [7, 7, 1]
    waited: list[float] = []
    calls = mock.MagicMock()
    calls.getppid.side_effect = parents
    monkeypatch.setattr(child, "os", calls)
    monkeypatch.setattr(child, "time", mock.MagicMock(sleep=waited.append))
    child._end_with(7)
    assert len(waited) == 2
    calls._exit.assert_called_once_with(1)


def test_an_interruption_ends_the_process_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(job: Job) -> ScaleRun:
        raise KeyboardInterrupt

    order = {"shape": TINY, "layers": 1, "method": "planned", "settings": {}, "level": 30}
    ordered(monkeypatch, order)
    monkeypatch.setattr(child, "measure", interrupted)
    with pytest.raises(SystemExit) as ended:
        child.main()
    assert ended.value.code == 130
    assert ended.value.__suppress_context__


# refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "gpt3"], "llama-7b, llama-70b, llama-405b, or d,L,h"),
        (["--shape", "32,2,2,64"], "found '32,2,2,64'"),
        (["--shape", "32,2,3,64,101"], "d a multiple of 2h"),
        (["--shape", "32,2,32,64,101"], "d a multiple of 2h"),  # heads of one number
        (["--shape", "32,0,2,64,101"], "found '32,0,2,64,101'"),
        (["--shape", ""], "found ''"),
        (["--layers", "0"], "--layers: expected numbers of at least 1, such as 2,4; found 0"),
        (["--layers", "2,-1"], "found 2,-1"),
        (["--layers", "two"], "found 'two'"),
        (["--layers", ""], "found ''"),
        (["--tokens", "8"], "--tokens: expected at least 1,024"),
        (["--tokens", "1023"], "two batches of 1 windows of 512 tokens"),
        (["--tokens", "0"], "found 0"),
        (["--batch-size", "16", "--tokens", "8192"], "expected at least 16,384"),
        (["--batch-size", "0"], "--batch-size: expected at least 1; found 0"),
        (["--length", "1"], "--length: expected at least 2; found 1"),
        (["--length", "4096"], "reads at most 2048 tokens at once"),
        (["--shape", "gpt2", "--length", "1025", "--layers", "1"], "gpt2 reads at most 1024"),
        (["--keep", "0"], "--keep: expected a share of the numbers above 0 and below 1; found 0"),
        (["--keep", "1"], "found 1"),
        (["--keep", "80"], "found 80"),
        (["--keep", "nan"], "found nan"),
        (["--split", "no"], "--split: expected heads or qkv or false; found 'no'"),
        (["--dtype", "int8"], "dtype: expected one of float32"),
        (["--threads", "-1"], "--threads: expected at least 0; found -1"),
        (["--plot", "scale.txt"], "expected a picture ending in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[Job] = []
    monkeypatch.setattr(running, "in_own_process", started.append)
    monkeypatch.setattr(child.subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    shape = [] if "--shape" in arguments else ["--shape", TINY]
    size = [] if {"--length", "--tokens"} & {*arguments} else ["--tokens", "8192"]
    assert main(["bench", "scale", "--quiet", *shape, *size, *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize("where", ["file", "folder", "nowhere"])
def test_a_picture_that_could_not_be_written_is_refused_before_anything_runs(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(child.subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    path, reason = {
        "file": (tmp_path / "file" / "a.svg", "Not a directory"),
        "folder": (tmp_path / "folder.svg", "it is a folder"),
        # a file system that nobody can write to, root neither
        "nowhere": (Path("/proc/nowhere/a.svg"), "/proc"),
    }[where]
    if where == "nowhere" and not os.path.isdir("/proc/self"):
        pytest.skip("Linux")
    assert main(["bench", "scale", "--quiet", "--shape", TINY, "--plot", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"cannot write {path}" in said
    assert reason in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.svg"]


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "free", lambda: 4 * 27_104)
    assert len(jobs([TINY], [1, 2], SMALL)) == 6
    # the third layer is the one that is too much
    expected = r"3 layers in float32 are 0 MB, and 0 MB of memory are free; give --dtype bfloat16, "
    with pytest.raises(ConfigError, match=expected):
        jobs([TINY], [1, 3], SMALL)
    half = replace(SMALL, dtype="bfloat16")
    assert len(jobs([TINY], [3], half)) == 3
    monkeypatch.setattr(running, "free", lambda: 20 * 10**9)
    expected = r"llama-7b: the weights of 32 layers in float32 are 26\.95 GB, and 20\.00 GB of memo"
    with pytest.raises(ConfigError, match=expected):
        jobs([TINY, "llama-7b"], None, SMALL)
    assert [job.layers for job in jobs(["llama-7b"], None, half)] == [32, 32, 32]
    with pytest.raises(ConfigError, match=r"26\.\d+ GB, .* are free; give fewer --layers or a sma"):
        jobs(["llama-7b"], [64], half)


def test_the_command_prints_tables_and_exits_with_an_error_where_a_run_failed(
    found: ScaleBench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed = replace(found, runs=(*found.runs[1:], replace(found.runs[0], failed="no luck")))
    for bench, code in ((found, 0), (failed, 1)):
        monkeypatch.setattr(running, "bench_scale", lambda *_, bench=bench: bench)
        plot = tmp_path / f"{code}" / "scale.svg"
        assert main(["bench", "scale", "--quiet", "--shape", TINY, "--plot", str(plot)]) == code
        assert plot.exists()
        text = capsys.readouterr().out
        assert "spectra" in text
        assert ("failed: 32,2,2,64,101, 1 layer, planned: no luck" in text) == bool(code)
        assert main(["bench", "scale", "--quiet", "--json"]) == code
        assert ScaleBench.from_dict(json.loads(capsys.readouterr().out)) == bench


def test_an_unwritable_name_is_an_error_of_the_store() -> None:
    from fxshare.base.files import check_writable

    with pytest.raises(StoreError, match="it is a folder; give the name of a file"):
        check_writable(Path("/"))
