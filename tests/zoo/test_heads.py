"""Narrower heads in every family of the zoo whose attention the graph shows."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.plans.heads import heads_of
from fxshare.sites.attention import attentions
from tests.zoo.families import FAMILIES, Family
from tests.zoo.narrowed import check_carried_out, prepared

# one of each way to divide a product and to repeat heads; the others repeat what these show and
# are run with -m slow
_KINDS = ("gpt2", "llama", "gpt_neox", "falcon", "bloom", "t5", "nn_multihead", "timm_vit")
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
def test_heads_of_every_attention_are_narrower_and_the_rest_is_what_it_says(one: Family) -> None:
    stages = prepared(one)
    graph = stages.captured.graph
    found = attentions(graph, stages.sites, side_by_side=stages.captured.side_by_side)
    assert found.found
    assert {(x.heads, x.kv_heads) for x in found.found} == {HEADS.get(one.name, (4, 4))}
    crosses = any("cross-attention" in reason for reason in found.reasons.values())
    assert crosses == (one.name in ("t5", "whisper", "nn_transformer"))
    entries = [
        heads_of(x.values, x.consumer, x.width, kept=max(x.width // 2, 1), name=f"heads_{number}")
        for number, x in enumerate(found.found)
    ]
    check_carried_out(one, stages, entries)
