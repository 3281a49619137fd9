"""Narrower queries and keys in every family of the zoo whose graph shows that they may be."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.plans.keys import keys_of
from fxshare.sites.scores import all_scores
from tests.zoo.families import FAMILIES, Family
from tests.zoo.narrowed import check_carried_out, prepared

# one of each way to divide a product, to turn heads and to repeat them; the others repeat what
# these show and are run with -m slow
_KINDS = ("llama", "gpt_neox", "falcon_grouped", "bloom", "t5", "qwen3")
NORMS = {
    "qwen3": "as a norm of queries or keys does",
    "gemma3": "as a norm of queries or keys does",
    "timm_vit": "'blocks_0_attn_q_norm'",
}
"""Why those of these families are left alone."""
ROTARY = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "gemma", "gemma2", "phi3", "falcon", "falcon_grouped"),
        ("halves", 8),
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "gpt_oss"), ("halves", 8)),
    "gpt_neox": ("halves", 2),
}
"""Which numbers of a head are turned, and how many; of others none."""
HEADS = {
    "falcon": (4, 1),
    "gemma": (4, 1),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon_grouped"), (4, 2)
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "gpt_oss"), (4, 2)),
}
"""Heads and key-value heads; of others both are 4."""


def _all() -> list[Any]:
    return [
        pytest.param(f, id=f.name, marks=() if f.name in _KINDS else pytest.mark.slow)
        for f in FAMILIES
    ]


@pytest.mark.parametrize("one", _all())
def test_queries_and_keys_are_narrower_and_the_rest_is_what_it_says(one: Family) -> None:
    stages = prepared(one)
    graph = stages.captured.graph
    found = all_scores(graph, stages.sites, side_by_side=stages.captured.side_by_side)
    if one.name in NORMS:
        assert not found.found
        assert any(NORMS[one.name] in reason for reason in found.reasons.values())
        return
    assert {(x.heads, x.kv_heads) for x in found.found} == {HEADS.get(one.name, (4, 4))}
    rotary = ROTARY.get(one.name, ("none", 0))
    assert {(x.rotary, x.rotated) for x in found.found} == {rotary}
    crosses = any("cross-attention" in reason for reason in found.reasons.values())
    assert crosses == (one.name in ("t5", "whisper", "nn_transformer"))
    entries = [
        keys_of(x, kept=x.width // 2, name=f"keys_{number}") for number, x in enumerate(found.found)
    ]
    check_carried_out(one, stages, entries)
