"""The cost model: what it counts, what it predicts, where its constants are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import fxshare
from fxshare.bench.demo import CONFIG
from fxshare.config import Budget, Planner, load_config
from fxshare.cost_model import (
    DECODE,
    PREFILL,
    SIDE_UNIT,
    Attention,
    Matmul,
    Rates,
    Traffic,
    dense_seconds,
    forecasts,
    launches,
    linears_of,
    no_slower,
    pass_seconds,
    product_seconds,
    rates_path,
    read_rates,
    seconds,
    step_bytes,
    step_flops,
    time_shares,
    without_linears,
    write_rates,
)
from fxshare.cost_model.measured import Measured
from fxshare.cost_model.recorder import record_step
from fxshare.cost_model.whole import dense_steps
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import ConfigError, FxShareWarning, PlanError
from fxshare.planning.options import options_of, second_unit
from fxshare.plans.cost import Shape
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import PLAIN, STORAGES, Storage
from fxshare.result.module import record_of
from fxshare.sites.site import Site, SliceSpec
from fxshare.views.table import slower_than_dense, time_table

# numbers that can be multiplied in the head: 1 GFLOP/s, 1 GB/s, a launch of 1 ms or 0.1 ms
SLOW = Rates(
    device="cpu",
    name="A Processor (R)",
    dtype="float32",
    threads=1,
    element_size=4,
    matmul=((1, 1e9),),
    bandwidth=((1, 1e9),),
    launch=1e-3,
    launch_compiled=1e-4,
)


def site(name: str = "fc", width: int = 100, height: int = 100, parts: int = 1) -> Site:
    step = height // parts
    slices = [
        SliceSpec(name=f"{name}.{n}", start=n * step, stop=(n + 1) * step) for n in range(parts)
    ]
    return Site(
        name=name,
        calls=(name,),
        type="fc",
        layer=0,
        in_features=width,
        out_features=height,
        bias=False,
        slices=tuple(slices),
    )


def plan_of(one: Site, rank: int, **keys: Any) -> Plan:
    group = Group(
        name="basis",
        type="fc",
        label="",
        layers=(0,),
        slices=tuple(s.name for s in one.slices),
        in_features=one.in_features,
        out_features=one.out_features,
        rank=rank,
        **keys,
    )
    return Plan(mode="sharing", sites=(one,), groups=(group,))


def small_gpt(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    sizes = GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ffn=48, block_size=32, vocab_size=40)
    return GPT(sizes).eval().to(dtype)


# the roofline ---------------------------------------------------------------------------------


def test_a_product_takes_the_longer_of_arithmetic_and_traffic() -> None:
    # 512 rows: 2 * 512 * 100 * 100 FLOPs at 1 GFLOP/s; the traffic is far below
    assert seconds(SLOW, [Matmul(512, 100, 100)], compiled=True) == pytest.approx(
        512 * 2e4 / 1e9 + 1e-4
    )
    # one row: 10,200 numbers of 4 bytes at 1 GB/s; the arithmetic is half of it
    assert seconds(SLOW, [Matmul(1, 100, 100)], compiled=True) == pytest.approx(
        4 * 10_200 / 1e9 + 1e-4
    )
    assert seconds(SLOW, [Matmul(1, 100, 100)], compiled=False) == pytest.approx(
        4 * 10_200 / 1e9 + 1e-3
    )


def test_a_batch_of_products_is_one_launch() -> None:
    one, three = (
        seconds(SLOW, [Matmul(8, 16, 16, batch=n)], compiled=False) - SLOW.launch for n in (1, 3)
    )
    assert three == pytest.approx(3 * one)


def test_what_stands_between_products_is_one_kernel_when_compiled() -> None:
    between = [Traffic(1000, 2000), Traffic(2000, 2000), Traffic(2000, 500)]
    assert seconds(SLOW, between, compiled=True) == pytest.approx(4 * 1500 / 1e9 + 1e-4)
    assert seconds(SLOW, between, compiled=False) == pytest.approx(4 * 9500 / 1e9 + 3e-3)
    apart = [between[0], Matmul(1, 1, 1), between[2]]
    assert seconds(SLOW, apart, compiled=True) > 3 * SLOW.launch_compiled


def test_a_compiled_pass_is_entered_once() -> None:
    slow = replace(SLOW, entry=7.0)
    step = [Traffic(1, 1), Traffic(1, 1), Matmul(1, 1, 1), Traffic(1, 1), Attention(1, 1, 1, 1)]
    for compiled, entered, launched in ((True, 7.0, 4), (False, 0.0, 5)):
        of_operations = seconds(slow, step, compiled=compiled)
        assert of_operations < 1
        assert pass_seconds(slow, step, compiled=compiled) == of_operations + entered
        assert launches(step, compiled=compiled) == launched


def test_causal_attention_is_half_the_arithmetic() -> None:
    assert Attention(4, 64, 64, 8, causal=True).flops * 2 == Attention(4, 64, 64, 8).flops


def test_rates_are_interpolated_between_points_and_constant_beyond() -> None:
    rates = replace(SLOW, matmul=((10, 1e9), (1000, 1e11)))
    assert rates.flops_per_second([1, 10, 100, 1000, 10**6]) == pytest.approx(
        [1e9, 1e9, 1e10, 1e11, 1e11]
    )


# a plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
def test_slices_of_one_basis_are_two_products(parts: int) -> None:
    one = site(height=120, parts=parts)
    found = linears_of(plan_of(one, 30), 8)
    assert found == [Matmul(8, 100, 30), Matmul(8, 30, 120)]
    assert linears_of(plan_of(one, 30), 8, dense=True) == [Matmul(8, 100, 120)]


def test_pivoted_storage_gathers_and_multiplies_what_is_left() -> None:
    found = linears_of(plan_of(site(), 30, storage="pivoted"), 8)
    assert found == [Traffic(800, 800), Matmul(8, 70, 30), Matmul(8, 30, 100)]


def test_flops_and_bytes_are_the_report_s() -> None:
    torch.manual_seed(0)
    ids = torch.randint(40, (2, 8))
    uniform = {"group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(small_gpt(), [CONFIG, uniform], example=ids)
    report = record_of(gm).report
    for dense, flops, size in (
        (True, sum(g.flops_before for g in report.groups), "bytes_before"),
        (False, sum(g.flops_after for g in report.groups), "bytes_after"),
    ):
        step = linears_of(record_of(gm).plan, 1, dense=dense)
        assert step_flops(step) == flops
        assert step_bytes(step, 4) == sum(getattr(g, size) for g in report.groups)


def test_forecasts_of_half_the_arithmetic() -> None:
    rates = replace(SLOW, launch=1e-9, launch_compiled=1e-9)
    one = site(width=1000, height=1000)
    found = forecasts(plan_of(one, 250), rates)
    assert [(f.step, f.compiled) for f in found] == [
        ("prefill", False),
        ("prefill", True),
        ("decode", False),
        ("decode", True),
    ]
    # 250 * 2000 of 1000 * 1000, and the activations of one more product
    assert all(1.9 < f.speedup <= 2.0 for f in found)
    assert slower_than_dense(found) is None
    header, rows = time_table(found)
    assert all(len(row) == len(header) for row in rows)


def test_a_plan_past_break_even_is_said_to_be_slower() -> None:
    found = forecasts(plan_of(site(), 90), SLOW)
    message = slower_than_dense(found)
    assert message is not None
    assert "prefill eager 0.5" in message or "prefill eager 0.6" in message
    assert "decode compiled" in message


def test_the_rest_of_the_model_makes_less_of_a_gain() -> None:
    one = site(width=1000, height=1000)
    whole = {
        PREFILL: [Matmul(PREFILL, 1000, 1000), Matmul(PREFILL, 1000, 5000)],
        DECODE: [Matmul(1, 1000, 1000), Matmul(1, 1000, 5000)],
    }
    found = forecasts(plan_of(one, 250), SLOW, whole=whole)
    alone = {(f.step, f.compiled): f for f in found if not f.whole}
    for f in found:
        if f.whole:
            assert 1 < f.speedup < alone[f.step, f.compiled].speedup
            assert f.dense > alone[f.step, f.compiled].dense


def test_without_linears_takes_each_out_once() -> None:
    step = [Matmul(8, 4, 6), Traffic(1, 1), Matmul(8, 4, 6), Matmul(2, 4, 6, batch=4)]
    assert without_linears(step, [Matmul(8, 4, 6)] * 2) == [step[1], step[3]]
    assert without_linears(step, [Matmul(8, 4, 6)] * 4) == [step[1]]


# the planner's constraint ---------------------------------------------------------------------

RANKS = np.arange(1, 65)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 3),
    st.sampled_from(STORAGES),
)
def test_time_rises_with_rank_where_rates_are_flat(
    width: int, height: int, inputs: int, storage: Storage
) -> None:
    shape = Shape(width, height * inputs, inputs)
    rank = np.arange(1, min(width, height) + 1)
    found = product_seconds(SLOW, shape, rank, storage, tokens=PREFILL)
    assert found.shape == rank.shape
    assert (np.diff(found) >= 0).all() or storage.keeps_inputs
    dense = product_seconds(SLOW, shape, 0, None, tokens=PREFILL)
    halves = product_seconds(SLOW, replace(shape, out_features=height * inputs * 2), 0, None,
                             tokens=PREFILL)  # fmt: skip
    assert float(halves) == pytest.approx(2 * float(dense))


def test_shares_of_time_add_up_to_dense_and_bound_either_step() -> None:
    rates = replace(SLOW, matmul=((1, 1e9), (64, 8e9)), bandwidth=((1 << 20, 2e9), (1 << 26, 1e9)))
    shapes = [Shape(64, 192), Shape(64, 64), Shape(64, 256), Shape(256, 64)]
    whole = dense_seconds(rates, shapes)
    dense = [int(time_shares(rates, s, np.array([0]), None, whole)[0]) for s in shapes]
    assert sum(dense) == pytest.approx(SIDE_UNIT, abs=len(shapes))
    low = [int(time_shares(rates, s, np.array([20]), PLAIN, whole)[0]) for s in shapes]
    for tokens, total in zip((PREFILL, DECODE), whole, strict=True):
        took = sum(
            float(product_seconds(rates, s, np.array([20]), PLAIN, tokens=tokens)[0])
            for s in shapes
        )
        assert took / total <= sum(low) / SIDE_UNIT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def budget(**limits: float) -> dict[str, Any]:
    return {
        **CONFIG,
        "budget": limits,
        "planner": {
            "search": "off",
            "strategy": "separate",
            "storage": "plain",
            "never_slower": False,
        },
    }


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (4, 16), generator=generator) for _ in range(3)]


def test_time_kept_needs_constants(cache: Path) -> None:
    with pytest.raises(PlanError, match="fxshare bench device --dtype float32 --threads"):
        fxshare.plan(small_gpt(), budget(params_kept=0.9, time_kept=0.6), calibration=batches())


def test_time_kept_bounds_the_plan(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxshare.planning.options.rates_of_model", lambda model: SLOW)
    free = fxshare.plan(small_gpt(), budget(params_kept=0.9), calibration=batches())
    tight = fxshare.plan(small_gpt(), budget(params_kept=0.9, time_kept=0.6), calibration=batches())
    # where rates are flat and launches left out, time is arithmetic
    dense = step_flops(linears_of(free, 1, dense=True))
    assert step_flops(linears_of(free, 1)) > 0.6 * dense
    assert step_flops(linears_of(tight, 1)) <= 0.6 * dense
    assert tight.outlook is not None
    assert free.outlook is not None
    assert tight.outlook.predicted > free.outlook.predicted


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 3), st.sampled_from(STORAGES))
def test_what_is_no_slower_is_so_in_both_steps(
    width: int, height: int, inputs: int, storage: Storage
) -> None:
    shape = Shape(width, height * inputs, inputs)
    rank = np.arange(1, min(width, height) + 1)
    fine = no_slower(SLOW, shape, rank, storage)
    for tokens in (PREFILL, DECODE):
        took = product_seconds(SLOW, shape, rank, storage, tokens=tokens)
        took = took + SLOW.launch_compiled * inputs
        assert (took <= product_seconds(SLOW, shape, 0, None, tokens=tokens))[fine].all()
    free = replace(SLOW, launch_compiled=1e-12)
    assert (no_slower(free, shape, rank, storage) >= fine).all()
    assert not no_slower(replace(SLOW, launch_compiled=1e3), shape, rank, storage).any()


def test_times_are_planned_for_the_prompt_that_the_model_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of which its products were measured."""
    products = (((32, 64, 16), 9.0), ((32, 16, 64), 9.0), ((32, 64, 64), 1.0))
    rates = replace(SLOW, launch_compiled=1e-12, measured=Measured(products=products))
    monkeypatch.setattr("fxshare.planning.options.rates_of_model", lambda model: rates)
    options = options_of(Budget(params_kept=0.9, time_kept=0.9), Planner(), small_gpt())
    assert options.prompt == 32
    shape, rank = Shape(64, 64), np.array([16])
    for prompt, fine in ((PREFILL, True), (options.prompt, False)):
        assert no_slower(rates, shape, rank, PLAIN, prompt=prompt).all() == fine
        side, _ = second_unit([shape], replace(options, prompt=prompt))
        assert (side(shape, rank, PLAIN)[0] < SIDE_UNIT) == fine


def test_never_slower_leaves_dense_what_a_launch_would_slow_down(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cfg = batches(), budget(params_kept=0.9)
    cfg["planner"]["never_slower"] = True
    with pytest.raises(PlanError, match=r"planner\.never_slower: times are predicted"):
        fxshare.plan(small_gpt(), cfg, calibration=data)
    quick = replace(SLOW, launch_compiled=1e-12)
    monkeypatch.setattr("fxshare.planning.options.rates_of_model", lambda model: quick)
    plan = fxshare.plan(small_gpt(), cfg, calibration=data)
    assert plan.groups
    shapes = {s.name: Shape(o.in_features, s.out_features) for o in plan.sites for s in o.slices}
    for group in plan.groups:
        (shape,) = map(shapes.__getitem__, group.slices)
        assert no_slower(quick, shape, np.array([group.rank]), group.stored_as).all()
    # where each operation takes a second no basis is worth its own
    monkeypatch.setattr(
        "fxshare.planning.options.rates_of_model", lambda model: replace(SLOW, launch_compiled=1.0)
    )
    said = r"below the cheapest plan.*planner: \{never_slower: false\} lets bases be slower"
    for never_slower in (True, None):  # which is so where time is bounded
        cfg["planner"]["never_slower"] = never_slower
        cfg["budget"]["time_kept"] = None if never_slower else 0.9
        with pytest.raises(PlanError, match=said):
            fxshare.plan(small_gpt(), cfg, calibration=data)
    del cfg["budget"]["time_kept"]
    cfg["planner"]["never_slower"] = False
    assert fxshare.plan(small_gpt(), cfg, calibration=data).groups


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"time_kept": 0.5}, "expected one limit of"),
        ({"params_kept": 0.5, "time_kept": 0}, "budget.time_kept: expected the fraction"),
        (
            {"params_kept": 0.5, "flops_kept": 0.5, "time_kept": 0.5},
            "found flops_kept and time_kept beside params_kept",
        ),
    ],
)
def test_limits_that_are_refused(limits: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(budget(**limits))


def test_time_may_stand_beside_flops() -> None:
    found = load_config(budget(flops_kept=0.5, time_kept=0.7)).budget
    assert found is not None
    assert found.time_kept == 0.7


# the constants' file --------------------------------------------------------------------------


def test_rates_come_back(cache: Path) -> None:
    assert read_rates("cpu", SLOW.name, "float32", 1) is None
    path = write_rates(SLOW)
    assert path == cache / "fxshare" / "device" / "cpu-a-processor-r-float32-1.json"
    assert read_rates("cpu", SLOW.name, "float32", 1) == SLOW
    assert read_rates("cpu", SLOW.name, "float32", 2) is None
    assert list(path.parent.iterdir()) == [path]


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert rates_path("cpu", "x", "float32", 1).is_relative_to(Path.home() / ".cache")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"version": 2}, "expected version 1, found 2"),
        ({"matmul": []}, "matmul: expected pairs"),
        ({"matmul": [[8, 1.0], [4, 1.0]]}, "matmul: expected pairs"),
        ({"launch": 0}, "launch: expected positive"),
        ({"bandwidth": [[1, float("nan")]]}, "bandwidth: expected positive"),
        ({"threads": None}, "not a file of device constants"),
    ],
)
def test_a_file_that_cannot_be_used_counts_as_none(
    cache: Path, edit: dict[str, Any], reason: str
) -> None:
    path = write_rates(SLOW)
    path.write_text(json.dumps({**SLOW.to_dict(), **edit}), encoding="utf-8")
    with pytest.warns(FxShareWarning, match=reason):
        assert read_rates("cpu", SLOW.name, "float32", 1) is None
    path.write_text("{", encoding="utf-8")
    with pytest.warns(FxShareWarning, match="fxshare bench device"):
        assert read_rates("cpu", SLOW.name, "float32", 1) is None


# recording ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_flops_are_torch_s(dtype: torch.dtype) -> None:
    model, ids = small_gpt(dtype), torch.zeros(2, 24, dtype=torch.int64)
    step = record_step(model, {"idx": ids})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    products = [o for o in step if isinstance(o, Matmul)]
    attention = [o for o in step if isinstance(o, Attention)]
    assert len(attention) == 2
    assert all(o.causal for o in attention)
    # torch counts no attention on the CPU; two products of 24 x 24 x 16 for each of 2 windows
    assert step_flops(products) == counter.get_total_flops()
    assert step_flops(attention) == 2 * (2 * 2 * 2 * 24 * 24 * 16) // 2
    numbers = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "wpe" not in n)
    assert step_bytes(step, 1) == numbers


def test_recording_leaves_the_model_alone() -> None:
    model = small_gpt()
    before = dict(model.named_parameters())
    record_step(model, {"idx": torch.zeros(1, 4, dtype=torch.int64)})
    assert all(p is before[name] for name, p in model.named_parameters())
    assert type(next(model.parameters())) is torch.nn.Parameter
    model(torch.zeros(1, 4, dtype=torch.int64))


def test_the_whole_model_is_its_linears_and_the_head_and_attention() -> None:
    model = small_gpt()
    plan = fxshare.plan(model, CONFIG)
    whole = dense_steps(model, 32)
    rest = without_linears(whole[32], linears_of(plan, 32, dense=True))
    assert [o for o in rest if isinstance(o, Matmul)] == [Matmul(32, 16, 40)]
    assert sum(isinstance(o, Attention) for o in rest) == 2


def test_a_model_that_does_not_read_tokens_has_no_whole() -> None:
    assert dense_steps(torch.nn.Linear(3, 3), 8) == {}
