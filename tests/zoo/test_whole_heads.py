"""Whole heads go in every family of the zoo whose attention treats all alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxshare
from fxshare import Plan
from fxshare.compiling.stages import prepare
from fxshare.config import load_config
from fxshare.plans.whole_heads import whole_heads_of
from fxshare.sites.head_groups import head_groups
from fxshare.verifying.multiplied import multiplied_out
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import FAMILIES, Family
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
    subject = one.subject()
    stages = prepare(subject.model, load_config(subject.config), one.batches(), None, None)
    graph = stages.captured.graph
    found = head_groups(graph, stages.sites, side_by_side=stages.captured.side_by_side).found
    assert {(x.heads, x.kv_heads) for x in found} == {HEADS.get(one.name, (4, 4))}
    entries = [
        whole_heads_of(x, kept=x.kv_heads // 2, name=f"heads_{number}")
        for number, x in enumerate(found)
    ]
    plan = Plan(mode="planned", sites=stages.sites, units=tuple(entries))
    with no_warnings_of_ours():
        gm = fxshare.compile(
            subject.model, subject.config, calibration=one.batches(), plan=plan, check=False
        )
    call = one.call(seed=3)
    assert fxshare.verify(subject.model, gm, call).ok
    assert fxshare.verify(subject.model, fxshare.lower(gm, prefer="speed"), call).ok
    expected = multiplied_out(subject.model, gm)
    if getattr(gm, "can_generate", lambda: False)() and "input_ids" in call:
        ids = call["input_ids"][:1, :5]
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(gm.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "t5" else pytest.mark.slow) for n in LEFT]
)
def test_heads_that_are_told_apart_stay_with_the_reason(name: str) -> None:
    one = next(family for family in FAMILIES if family.name == name)
    subject = one.subject()
    stages = prepare(subject.model, load_config(subject.config), one.batches(), None, None)
    found = head_groups(stages.captured.graph, stages.sites)
    assert not found.found
    assert any(LEFT[name] in reason for reason in found.reasons.values()), found.reasons
