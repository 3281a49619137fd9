"""``fxshare bench run``: its variants compute the same, and its figures are those of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.base.quantised import Quantised
from fxshare.bench.capture import FAMILIES, bench_capture, family, lines
from fxshare.bench.speed.alone import alone, alone_steps
from fxshare.bench.speed.compiled import compiled_call
from fxshare.bench.speed.measuring import Timing, measured
from fxshare.bench.speed.notebook import SliceProducts, notebook_layout
from fxshare.bench.speed.run import VARIANTS, SpeedBench, available, bench_run, chosen
from fxshare.bench.speed.separate import separated
from fxshare.bench.speed.subject import (
    GPTShape,
    Settings,
    Subject,
    dense_again,
    gpt_types,
    random_gpt,
    shape_subject,
    with_storage,
)
from fxshare.bench.speed.table import compile_table, draw, lines_below, table, type_table
from fxshare.cli import main
from fxshare.cost_model import Matmul
from fxshare.cost_model.recorder import record_step
from fxshare.errors import ConfigError
from fxshare.plans.storage import PIVOTED
from fxshare.result.products import dense_sites
from passes import slices
from passes.errors import FxShareError

SHAPE = GPTShape(32, 2, 4, 64)


def subject(shape: GPTShape = SHAPE, **keys: Any) -> Subject:
    return shape_subject(
        shape,
        Settings(**keys),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context=24,
        vocabulary=40,
        seed=0,
    )


@pytest.fixture(scope="module")
def plain() -> Subject:
    return subject()


def ids() -> torch.Tensor:
    return torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))


def assert_same(left: nn.Module, right: nn.Module, plan: fxshare.Plan) -> None:
    with torch.no_grad():
        distance = worst(left(ids()), right(ids()))
    assert distance.relative <= tolerance(torch.float32, 2 * len(plan.sites) + 1), str(distance)


# the variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "storage"), [("heads", "pivoted"), ("qkv", "plain"), ("false", "pivoted")]
)
def test_the_notebook_layout_computes_what_the_compiled_model_does(
    split: Any, storage: Any
) -> None:
    one = subject(GPTShape(16, 1, 2, 24), split=split, storage=storage)
    slow = notebook_layout(one.dense, one.compiled, one.plan)
    assert_same(slow, one.compiled, one.plan)
    parts = {m for m in slow.modules() if isinstance(m, SliceProducts)}
    assert len(parts) == len(one.plan.sites)
    assert all(type(m) is not SliceProducts for m in one.dense.modules())


def test_the_notebook_layout_multiplies_a_basis_for_every_head(plain: Subject) -> None:
    slow = notebook_layout(plain.dense, plain.compiled, plain.plan)
    (group,) = (g for g in plain.plan.groups if g.type == "attn_c_attn" and g.layers == (0,))
    call = {"idx": torch.zeros(1, 8, dtype=torch.int64)}
    count = {
        name: record_step(model, call).count(Matmul(8, 32, group.rank))
        for name, model in {"notebook": slow, "compiled": plain.compiled}.items()
    }
    # 4 heads of q, k and v, in two layers
    assert count == {"notebook": 2 * 12, "compiled": 2}


def test_a_notebook_layout_with_another_basis_is_told_apart(plain: Subject) -> None:
    slow = notebook_layout(plain.dense, plain.compiled, plain.plan)
    first = next(m for m in slow.modules() if isinstance(m, SliceProducts))
    basis = first.parts[0][0]  # type: ignore[index]
    basis.weight = nn.Parameter(basis.weight.flip(0))
    with pytest.raises(AssertionError):
        assert_same(slow, plain.compiled, plain.plan)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_every_matrix_keeps_its_share(kept: float, plain: Subject) -> None:
    types = gpt_types(SHAPE.heads, Settings())
    uniform = {"group_size": 1, "compression_rate": kept}
    plan = fxshare.plan(plain.dense, [types, uniform])
    for one in (plan, with_storage(plan, PIVOTED, kept)):
        for group in one.groups:
            assert group.stored_numbers <= kept * group.dense_numbers
            more = group.model_copy(update={"rank": group.rank + 1})
            assert more.stored_numbers > kept * group.dense_numbers


def test_pivoted_plans_have_higher_ranks(plain: Subject) -> None:
    other = with_storage(plain.plan, PIVOTED, 0.5)
    assert all(a.rank < b.rank for a, b in zip(plain.plan.groups, other.groups, strict=True))


def test_the_dense_model_of_a_folder_has_the_products(plain: Subject, tmp_path: Path) -> None:
    fxshare.save(plain.compiled, tmp_path / "out")
    again = dense_again(fxshare.load(tmp_path / "out"))
    assert_same(again, plain.compiled, plain.plan)
    products = dense_sites(plain.compiled, plain.plan)
    (site, *_) = plain.plan.sites
    torch.testing.assert_close(again.get_submodule(site.name).weight, products[site.name].float())


# the run --------------------------------------------------------------------------------------


def check_run(found: SpeedBench, variants: tuple[str, ...], modes: tuple[str, ...]) -> None:
    rows = [(r.step, r.mode, r.variant) for r in found.rows]
    assert rows == [(s, m, v) for s in ("prefill", "decode") for m in modes for v in variants]
    for row in found.rows:
        assert row.seconds > 0
        assert row.spread >= 0
        if row.variant == "dense":
            assert row.speedup == 1
        assert (row.compile_seconds is None) == (row.mode == "eager")
    header, cells = table(found)
    assert all(len(row) == len(header) for row in cells)


def test_every_variant_runs_eagerly(plain: Subject, tmp_path: Path) -> None:
    said: list[str] = []
    found = bench_run(plain, Timing(modes=("eager",), repeats=2, prefill=20), say=said.append)
    check_run(found, VARIANTS, ("eager",))
    by_name = {r.variant: r for r in found.rows if r.step == "prefill"}
    flops = {name: row.flops for name, row in by_name.items()}
    assert flops["dense"] == flops["exact"] == flops["exact-lowered"]
    assert flops["lowered"] is not None
    assert flops["dense"] is not None
    assert flops["lowered"] <= flops["readable"] < flops["dense"]  # type: ignore[operator]
    assert found.rows[0].tokens == 20
    assert not found.kv_cache
    assert said
    draw(found, tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_text("utf-8").lstrip().startswith("<?xml")
    assert any("medians of 2" in line for line in lines_below(found))


@pytest.mark.slow
def test_compiled_runs_say_what_compiling_took(plain: Subject) -> None:
    found = bench_run(plain, Timing(modes=("compiled",), repeats=1), variants=("lowered",))
    check_run(found, ("dense", "lowered"), ("compiled",))
    for row in found.rows:
        assert row.compile_seconds is not None
        assert row.inductor_seconds is not None
        assert 0 < row.inductor_seconds < row.compile_seconds + 0.1


@pytest.mark.slow
def test_compilations_are_repeated_and_compared_with_dense(plain: Subject) -> None:
    timing = Timing(modes=("compiled",), repeats=1, compile_repeats=3)
    found = bench_run(plain, timing, variants=("lowered",))
    header, rows = compile_table(found)
    assert [row[:2] for row in rows] == [
        [step, variant] for step in ("prefill", "decode") for variant in ("dense", "lowered")
    ]
    assert all(len(row) == len(header) for row in rows)
    for row in found.rows:
        assert row.compile_cpu_seconds is not None
        assert row.compile_cpu_seconds > 0.1
        if row.variant == "dense":
            assert row.compile_cpu_ratio == row.inductor_ratio == 1
        else:
            # what the processor did is the same work whatever else it does
            assert row.compile_cpu_ratio is not None
            assert row.compile_cpu_ratio < 2
    assert any("3 compilations" in line for line in lines_below(found))


def test_the_ratios_of_compilations_are_those_of_each_round() -> None:
    from fxshare.bench.speed.compiled import CompiledCall
    from fxshare.bench.speed.steps import StepCall

    seconds = {"dense": [1.0, 10.0, 2.0], "lowered": [1.5, 12.0, 2.8]}

    def call(name: str, number: int) -> CompiledCall:
        taken = seconds[name][number]
        return CompiledCall(lambda: None, 2 * taken, taken, 3 * taken)

    made = {name: [call(name, number) for number in range(3)] for name in seconds}
    models = {name: nn.Linear(2, 2) for name in seconds}
    nothing: dict[str, Any] = dict.fromkeys(models, dict)
    step = StepCall("prefill", 1, torch.device("cpu"), nothing, nothing, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxshare.bench.speed.measuring.compiled_calls", lambda *a, **k: made)
        none = dict.fromkeys(models, None)
        timing = Timing(repeats=1, compile_repeats=3)
        rows = measured(step, models, none, "compiled", None, timing)
    # 1.5, 1.2 and 1.4: the median over rounds, which is not the ratio of the medians
    assert [row.inductor_ratio for row in rows] == [1.0, pytest.approx(1.4)]
    assert [row.compile_cpu_ratio for row in rows] == [1.0, pytest.approx(1.4)]
    assert [row.inductor_seconds for row in rows] == [2.0, 2.8]


def test_the_linears_of_each_type_are_measured_alone(plain: Subject) -> None:
    found = bench_run(
        plain,
        Timing(modes=("eager",), repeats=1, prefill=8),
        variants=("notebook", "lowered"),
        by_type=True,
    )
    assert list(found.alone) == ["attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj"]
    dense = {
        kind: next(r.flops for r in rows if r.variant == "dense" and r.step == "prefill")
        for kind, rows in found.alone.items()
    }
    # 2 layers, 8 tokens, 2 FLOPs a multiplication
    assert dense == {
        "attn_c_attn": 2 * 8 * 2 * 32 * 96,
        "attn_c_proj": 2 * 8 * 2 * 32 * 32,
        "mlp_c_fc": 2 * 8 * 2 * 32 * 64,
        "mlp_c_proj": 2 * 8 * 2 * 32 * 64,
    }
    flops = {r.variant: r.flops for r in found.alone["attn_c_attn"] if r.step == "prefill"}
    # the notebook's heads multiply with the basis again, each of 12
    (group,) = (g for g in plain.plan.groups if g.type == "attn_c_attn" and g.layers == (0,))
    assert flops["lowered"] == 2 * 8 * 2 * group.rank * (32 + 96)
    assert flops["notebook"] == 2 * 8 * 2 * group.rank * (12 * 32 + 96)
    header, rows = type_table(found)
    assert all(len(row) == len(header) for row in rows)
    assert [row[3] for row in rows[:3]] == ["dense", "notebook", "lowered"]
    assert all(row[header.index("of dense")].endswith("%") for row in rows if row[3] == "dense")


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_linears_alone_have_the_plan_s_factors(storage: Any) -> None:
    one = subject(group_size=2, storage=storage)
    for part in alone(one):
        call = alone_steps(part, {"dense": part.dense}, prefill=5, seed=1)[0].calls["dense"]
        with torch.no_grad():
            outputs = part.compiled(**call)
        assert [y.shape[:2] for y in outputs] == [(1, 5), (1, 5)]
        assert part.plan.groups == tuple(g for g in one.plan.groups if g.type == part.name)
        products = dense_sites(part.compiled, part.plan)
        for site, x, y in zip(part.plan.sites, call["inputs"], outputs, strict=True):
            bias = part.dense.get_submodule(site.name).bias
            expected = nn.functional.linear(x, products[site.name].float(), bias)
            assert worst(expected, y).relative <= tolerance(torch.float32, 3)


def test_only_some_linears_are_compressed() -> None:
    one = subject(only=r".*h\.1\..*c_(attn|fc)$")
    assert [site.name for site in one.plan.sites] == [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.mlp.c_fc",
    ]
    with pytest.raises(FxShareError, match=r"--only: 'c_attn' matches none .*h\.0\.attn\.c_attn"):
        subject(only="c_attn")


@pytest.mark.slow  # a C++ compiler from nothing
def test_each_compilation_is_timed_for_itself() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls: list[int] = []
    with torch.no_grad():
        one = compiled_call("linear", linear, {"input": x}, lambda: calls.append(1), mode="default")
        torch.testing.assert_close(one.run(), linear(x))
    assert 0 < one.inductor_seconds < one.seconds
    assert one.cpu_seconds > 0
    assert len(calls) == 2


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        def run(call: object) -> object:
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(FxShareError, match="compile fails: RuntimeError"):
        compiled_call("lowered", nn.Linear(2, 2), {}, lambda: None, mode="default")


def test_predictions_stand_beside(plain: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cost_model.test_cost_model import SLOW

    monkeypatch.setattr("fxshare.bench.speed.run.rates_for", lambda device, dtype: SLOW)
    found = bench_run(plain, Timing(modes=("eager",), repeats=1), variants=("readable",))
    assert found.notes == ()
    for row in found.rows:
        assert row.predicted_seconds is not None
        assert row.predicted_seconds > SLOW.launch
    assert found.rows[0].predicted_speedup == 1
    monkeypatch.setattr("fxshare.bench.speed.run.rates_for", lambda device, dtype: None)
    found = bench_run(plain, Timing(modes=("eager",), repeats=1), variants=("readable",))
    assert "fxshare bench device --dtype float32" in found.notes[0]
    assert found.rows[0].predicted_seconds is None


def test_batches_are_predicted_by_their_rows(
    plain: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cost_model.test_cost_model import SLOW

    monkeypatch.setattr("fxshare.bench.speed.run.rates_for", lambda device, dtype: SLOW)
    runs = [
        bench_run(plain, Timing(modes=("eager",), repeats=1, batch=n), variants=("dense",))
        for n in (1, 3)
    ]
    one, three = ([row.flops for row in run.rows] for run in runs)
    assert all(
        c is not None and a is not None and c > 2 * a for a, c in zip(one, three, strict=True)
    )
    with_types = ["bench", "run", "--by-type", "--batch", "3"]
    assert main(with_types) == 2
    assert main(["bench", "run", "--separate"]) == 2


def test_separate_projections_are_the_fused_ones() -> None:
    fused = random_gpt(GPTShape(16, 1, 2, 32), context=8, vocabulary=48, seed=0)
    ids = torch.arange(6)[None]
    expected = fused(ids)
    apart = separated(fused)
    assert torch.allclose(apart(ids), expected, atol=1e-5)
    apart.transformer["h"][0].attn.k_proj.weight.data.neg_()  # type: ignore[index]
    assert not torch.allclose(apart(ids), expected, atol=1e-5)


def test_a_hugging_face_model_decodes_with_its_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fxshare.bench.speed.subject import named_subject

    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=48, n_positions=32, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    types = Path(__file__).parent.parent.parent / "configs" / "gpt2.yaml"
    text = types.read_text("utf-8").replace("n_head: 12", "n_head: 2")
    (tmp_path / "gpt2.yaml").write_text(text, encoding="utf-8")
    one = named_subject(
        str(tmp_path / "gpt2"),
        Settings(),
        configs=[tmp_path / "gpt2.yaml"],
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
    )
    assert one.kv_cache
    timing = Timing(modes=("eager",), repeats=2, prefill=16)
    found = bench_run(one, timing, variants=("readable", "notebook"))
    check_run(found, ("dense", "notebook", "readable"), ("eager",))
    assert found.kv_cache


# the command line -----------------------------------------------------------------------------


def test_the_command_prints_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plain: Subject
) -> None:
    command = ["bench", "run", "--shape", "16,1,2,48", "--prefill", "8", "--repeats", "1"]
    command += ["--modes", "eager", "--variants", "notebook"]
    assert main([*command, "--plot", str(tmp_path / "a.svg")]) == 0
    assert "GPT 16,1,2,48, float32, params_kept 0." in capsys.readouterr().out
    assert (tmp_path / "a.svg").exists()
    assert main([*command, "--storage", "pivoted", "--split", "qkv", "--json"]) == 0
    assert [r["variant"] for r in json.loads(capsys.readouterr().out)["rows"]] == [
        "dense",
        "notebook",
    ] * 2
    fxshare.save(plain.compiled, tmp_path / "out")
    saved = ["bench", "run", str(tmp_path / "out"), "--repeats", "1", "--modes", "eager"]
    assert main(saved) == 0
    out = capsys.readouterr().out
    assert "lowered" in out
    assert "exact" not in out
    assert main([*saved, "--variants", "exact"]) == 2
    assert "does not hold the original weights" in capsys.readouterr().err
    assert main([*saved, "--kept", "0.5"]) == 2
    assert "is compressed already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shape", "16,1,3,48"), "--shape: expected d,layers,heads,ffn"),
        (("--shape", "16,x"), "found '16,x'"),
        (("--shape", "16,1,2,0"), "--shape: expected"),
        (("other", "--shape", "16,1,2,48"), "found MODEL beside it"),
        (("nowhere",), "is not a model"),
        (("--original", "a:b"), "--original: names the model"),
        (("--kept", "1.5"), "--kept: expected a share"),
        (("--kept", "nan"), "--kept: expected a share"),
        (
            ("--storage", "zip"),
            "--storage: expected plain or pivoted or units or int8 or int4; found 'zip'",
        ),
        (("--split", "rows"), "--split: expected heads or qkv or false"),
        (("--basis", "all"), "--basis: expected"),
        (("--only", "a("), "--only: 'a(' is not a pattern"),
        (("--compile-repeats", "0"), "compile-repeats"),
        (("--group-size", "0"), "--group-size: expected at least 1"),
        (("--variants", "lowred"), "Did you mean 'lowered'?"),
        (("--modes", "fast"), "--modes: expected some of eager, compiled"),
        (("--compile-mode", "max"), "--compile-mode: expected some of default"),
        (("--dtype", "int8"), "dtype: expected one of"),
        (("--device", "tpu"), "device: expected cpu or cuda"),
        (("--plot", "speed.txt"), "expected a picture ending in"),
    ],
)
def test_what_the_command_refuses(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "run", *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_names_keep_their_order(plain: Subject) -> None:
    assert chosen("lowered, dense", VARIANTS, "--variants") == ("dense", "lowered")
    assert available(plain) == VARIANTS


# capture --------------------------------------------------------------------------------------


def test_capture_measures_a_model_without_weights() -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    found = bench_capture(lambda: family("llama", 2, num_key_value_heads=4, **sizes))
    assert found.sites == 14
    assert found.groups == 7
    assert found.seconds > 0
    assert 0 < found.capture_cpu_seconds <= found.cpu_seconds
    assert found.peak_bytes >= found.imported_bytes > 0
    assert any("GB at most" in line for line in lines(found))


def test_families_of_the_capture_bench() -> None:
    with pytest.raises(ConfigError, match=r"expected one of llama, qwen3, .*; found 'lama'"):
        family("lama")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_7b_shape_is_captured_in_three_seconds_and_two_gigabytes(name: str) -> None:
    pytest.importorskip("transformers")
    found = bench_capture(lambda: family(name))
    assert found.sites >= 4 * 28
    # of the processor: a busy machine takes longer
    assert found.capture_cpu_seconds < 3
    if found.groups == found.sites // 2:  # one slice a linear; 1,600 heads take longer to rewrite
        assert found.cpu_seconds < 10
    assert found.peak_bytes < 2e9


def test_fewer_hidden_units_are_measured_in_the_model_and_by_themselves() -> None:
    made = subject(storage="units", kept=0.25)
    assert [(one.kept, one.of, one.kind) for one in made.plan.units] == [
        (16, 64, "first_units")
    ] * 2
    assert not made.plan.groups
    assert available(made) == ("dense", "exact", "exact-lowered", "readable", "lowered")
    names = [part.name for part in alone(made)]
    assert names == ["mlp_c_fc+mlp_c_proj", "attn_c_attn", "attn_c_proj"]
    mlps = next(alone(made))
    x = tuple(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(at)) for at in (0, 1))
    dense, fewer = mlps.dense(x), mlps.compiled(x)
    for number, (a, b) in enumerate(zip(dense, fewer, strict=True)):
        assert a.shape == b.shape == (1, 3, 32)
        place = slices(mlps.compiled)[made.plan.units[number].consumer]
        assert place.unit_columns is not None
        assert place.unit_columns.kept == tuple(range(16))
        assert mlps.compiled.get_submodule(place.module).in_features == 16
    step = next(iter(alone_steps(mlps, {"dense": mlps.dense}, prefill=8, seed=0)))
    found = [o for o in record_step(mlps.compiled, step.calls["dense"]) if isinstance(o, Matmul)]
    assert {(o.inner, o.out) for o in found} == {(32, 16), (16, 32)}


@pytest.mark.parametrize(("storage", "bits"), [("int8", 8), ("int4", 4)])
def test_dense_weights_in_few_bits_are_measured_in_the_model_and_by_themselves(
    storage: Any, bits: int
) -> None:
    made = subject(storage=storage)
    assert {one.bits for one in made.plan.rounded} == {bits}
    assert made.plan.params_kept == 1.0
    assert "notebook" not in available(made)
    of_model = [p for p in made.compiled.parameters() if isinstance(p, Quantised)]
    parts = list(alone(made))
    assert [part.name for part in parts] == ["attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj"]
    of_parts = [p for x in parts for p in x.compiled.parameters() if isinstance(p, Quantised)]
    assert {one.bits for one in of_model} == {one.bits for one in of_parts} == {bits}
    stored = [sum(p.stored_bytes for p in ones) for ones in (of_model, of_parts)]
    assert stored[0] == stored[1]
    assert stored[0] < 0.4 * 4 * made.plan.dense_numbers


def test_units_of_a_model_that_shows_no_mlp_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--storage units: .* shows no MLP; .*attn\.c_attn"):
        subject(storage="units", only=".*attn")
