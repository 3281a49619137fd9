"""The keys of the planned mode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxshare.config import Budget, Planner, ShareConfig, dump_config, load_config
from tests.config.build import PLANNED, SHARED, TYPES, refusal, written


def test_a_budget_plans() -> None:
    cfg = load_config(PLANNED)
    assert cfg.mode == "planned"
    assert cfg.planner == Planner()
    assert cfg.group_size_of("attn") == 1
    assert load_config(PLANNED, overrides=["budget.flops_kept=0.9"]).budget == Budget(
        params_kept=0.8, flops_kept=0.9
    )
    assert load_config(PLANNED, overrides=["budget=null"]).mode == "exact"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "budget: expected one limit of params_kept, max_bytes, max_loss_increase"),
        ({"params_kept": 0.8, "max_bytes": 9}, "found params_kept, max_bytes"),
        ({"max_loss_increase": 0.1, "max_bytes": 9}, "found max_bytes, max_loss_increase"),
        ({"params_kept": 0}, "budget.params_kept: expected the fraction of parameters kept"),
        (
            {"params_kept": 1.5},
            "the fraction kept, above 0 and at most 1 (0.8 keeps 80 %); found 1.5",
        ),
        ({"bytes_kept": 2}, "the fraction kept, above 0 and at most 1 (0.8 keeps 80 %); found 2"),
        ({"params_kept": 80}, "found 80; 80 % is 0.8"),
        ({"params_kept": True}, "found true (a boolean)"),
        ({"params_kept": math.nan}, "which is not finite"),
        ({"flops_kept": "0.5"}, "found '0.5' (text)"),
        ({"max_bytes": 0.5}, "max_bytes: expected bytes, as a whole number above 0"),
        ({"max_bytes": 0}, "max_bytes: expected bytes, as a whole number above 0"),
        ({"max_loss_increase": 0}, "an increase of the loss per token in nats"),
        ({"parms_kept": 0.5}, "unknown key. Did you mean 'params_kept'? Valid keys: params_kept"),
        (3, "budget: expected a mapping of keys to values; found 3"),
    ],
)
def test_budgets_that_are_refused(budget: Any, said: str) -> None:
    assert said in refusal({"weight_types": TYPES, "budget": budget})


def test_a_budget_and_a_rate_contradict() -> None:
    assert "a budget plans the ranks, a rate fixes them" in refusal([SHARED, PLANNED])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strategy", "layer", "expected one of 'auto', 'grown', 'layers', 'pairs'"),
        ("strategy", "best", "expected one of 'auto', 'grown', 'layers', 'pairs'"),
        ("storage", "dense", "expected one of 'auto', 'plain' or 'pivoted'"),
        ("storag", "plain", "unknown key. Did you mean 'storage'?"),
        ("max_group", 0, "a whole number of at least 1"),
        ("rank_multiple", 0, "a whole number of at least 1"),
        ("floor", 1.5, "a share of the dense cost, a number from 0 to 1; found 1.5"),
        ("ceiling", -1, "a share of the dense cost, a number from 0 to 1; found -1"),
        ("keep_dense", 3, "planner.keep_dense: expected a list"),
        ("keep_dense", ["1"], "planner.keep_dense.0: expected a whole number; found '1' (text)"),
        ("keep_dense", [True], "planner.keep_dense.0: expected a whole number; found true"),
        ("may_share", [["attn", "mpl"]], "'mpl' (text) is no weight type. Did you mean 'mlp'?"),
        ("may_share", ["attn"], "planner.may_share.0: expected a list of names, such as [a, b]"),
        ("tie", [[1]], "planner.tie.0.0: expected text; found 1"),
        (
            "search",
            "of",
            "planner.search: expected one of 'off', 'kinds', 'quick', 'thorough' or 'refined'",
        ),
        (
            "search",
            True,
            "planner.search: expected one of 'off', 'kinds', 'quick', 'thorough' or 'refined'",
        ),
        ("remeasure", -1, "a whole number of at least 0; found -1"),
        ("refit", 1, "planner.refit: expected true or false; found 1"),
        ("bias", "no", "planner.bias: expected true or false; found 'no' (text)"),
        ("labels", "model", "expected one of 'data' or 'sampled'"),
    ],
)
def test_planner_keys_that_are_refused(key: str, value: Any, said: str) -> None:
    assert said in refusal([PLANNED, {"planner": {key: value}}])


def test_keys_of_the_planner_that_contradict() -> None:
    assert "floor 0.5 is above ceiling 0.4" in refusal(
        PLANNED, "planner.floor=0.5", "planner.ceiling=0.4"
    )
    for cfg in ({"weight_types": TYPES}, SHARED):
        assert "found without budget, where it has no effect" in refusal(cfg, "planner.floor=0.5")


def test_a_bare_off_is_off(tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    path = written(tmp_path, "planner: {search: off}")
    assert load_config([PLANNED, path]).planner.search == "off"
    assert load_config(PLANNED, overrides=["planner.search=off"]).planner.search == "off"


shares = st.floats(0, 1, exclude_min=True)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    flops = draw(st.none() | shares)
    limits: list[Budget] = [
        Budget(params_kept=draw(shares), flops_kept=flops),
        Budget(max_bytes=draw(st.integers(1)), flops_kept=flops),
        Budget(max_loss_increase=draw(shares), flops_kept=flops),
        Budget(flops_kept=draw(shares)),
    ]
    return draw(st.sampled_from(limits))


@st.composite
def planners(draw: st.DrawFn) -> Planner:
    floor, ceiling = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    names = st.lists(st.lists(st.sampled_from(["attn", "mlp"]), max_size=3), max_size=2)
    return Planner(
        strategy=draw(st.sampled_from(["auto", "layers", "pairs", "separate"])),
        storage=draw(st.sampled_from(["auto", "plain", "pivoted"])),
        max_group=draw(st.none() | st.integers(1, 9)),
        rank_multiple=draw(st.none() | st.integers(1, 9)),
        floor=floor,
        ceiling=ceiling,
        keep_dense=tuple(draw(st.lists(st.integers(), max_size=3))),
        may_share=tuple(map(tuple, draw(names))),
        tie=tuple(map(tuple, draw(names))),
        search=draw(st.sampled_from(["off", "quick", "thorough"])),
        remeasure=draw(st.integers(0, 3)),
        refit=draw(st.none() | st.booleans()),
        bias=draw(st.booleans()),
        labels=draw(st.sampled_from(["data", "sampled"])),
    )


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(budgets(), planners())
def test_dumped_plans_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, budget: Budget, planner: Planner
) -> None:
    cfg = ShareConfig(weight_types=TYPES, budget=budget, planner=planner)
    path = tmp_path_factory.getbasetemp() / "planned.yaml"
    path.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(path) == cfg
