"""Whole heads go in every family of the zoo whose attention treats all alike."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.plans.whole_heads import whole_heads_of
from fxshare.sites.head_groups import head_groups
from tests.zoo.families import FAMILIES, Family
from tests.zoo.narrowed import check_carried_out, prepared
from tests.zoo.test_heads import HEADS

# rows of heads in turns; grouped and fused; the others repeat what these and compiling show
_KINDS = ("gpt_neox", "falcon_grouped")
LEFT = {
    "bloom": "has weights of a sum that are no scores alone",  # slopes of positions by head
    "gpt_oss": "has weights of a sum that are no scores alone",  # sinks by head
    "t5": "other numbers for each head",  # biases of relative positions
    "gemma": "all share one key and one value",
    "falcon": "all share one key and one value",
    "qwen3": "as a norm of queries or keys does",
    "gemma3": "as a norm of queries or keys does",
    "timm_vit": "'blocks_0_attn_q_norm'",
}


def _marks(name: str) -> Any:
    return () if name in _KINDS else pytest.mark.slow


def _all() -> list[Any]:
    found = [f for f in FAMILIES if f.name not in LEFT]
    return [pytest.param(f, id=f.name, marks=_marks(f.name)) for f in found]


@pytest.mark.parametrize("one", _all())
def test_half_of_the_heads_go_and_the_rest_is_what_it_says(one: Family) -> None:
    stages = prepared(one)
    graph = stages.captured.graph
    found = head_groups(graph, stages.sites, side_by_side=stages.captured.side_by_side).found
    assert {(x.heads, x.kv_heads) for x in found} == {HEADS.get(one.name, (4, 4))}
    entries = [
        whole_heads_of(x, kept=x.kv_heads // 2, name=f"heads_{number}")
        for number, x in enumerate(found)
    ]
    check_carried_out(one, stages, entries)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "t5" else pytest.mark.slow) for n in LEFT]
)
def test_heads_that_are_told_apart_stay_with_the_reason(name: str) -> None:
    one = next(family for family in FAMILIES if family.name == name)
    stages = prepared(one)
    found = head_groups(stages.captured.graph, stages.sites)
    assert not found.found
    assert any(LEFT[name] in reason for reason in found.reasons.values()), found.reasons
