"""Every family with its embeddings and head in: what ``fxshare init`` offers, taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

import fxshare
from fxshare.record import record_of
from tests.zoo.families import FAMILIES, Family

# one of each kind: tied, scaled, with positions, three readers, none tied, experts, no transformers
_EACH = {"gpt2", "gemma", "opt", "t5", "falcon_grouped", "qwen2_moe", "clip_text", "nn_transformer"}
OFFERED = [
    pytest.param(f, id=f.name, marks=() if f.name in _EACH else pytest.mark.slow)
    for f in FAMILIES
    if f.inputs in ("ids", "pair")
]


def with_offers(family: Family) -> tuple[Any, dict[str, Any]]:
    """A model and the file that ``init`` writes for it, the # of what it offers taken off."""
    model = family.model()
    lines = fxshare.propose(model).text.splitlines()
    offer = [at for at, line in enumerate(lines) if "# Off unless asked for" in line]
    if offer:
        for at in range(offer[0], len(lines)):
            start, colon, rest = lines[at].partition(": {pattern:")
            if colon:
                lines[at] = start.replace("# ", "", 1) + colon + rest
    return model, yaml.safe_load("\n".join(lines))


@pytest.mark.parametrize("family", OFFERED)
def test_what_init_offers_can_be_taken(family: Family) -> None:
    model, cfg = with_offers(family)
    offered = [name for name, spec in cfg["weight_types"].items() if spec.get("embedding")]
    assert offered, family.name
    cfg |= {"group_size": 1, "compression_rate": 0.5}
    # compile verifies the outputs against the original with every product multiplied out
    gm = fxshare.compile(model, cfg, calibration=family.batches())
    plan = record_of(gm).plan
    looked_up = [site for site in plan.sites if site.lookups]
    assert {site.type for site in looked_up} == set(offered)
    if family.causal:
        ids = family.call()["input_ids"]
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected = ids
        with torch.no_grad():
            for _ in range(4):
                last = gm(input_ids=expected).logits[:, -1]
                expected = torch.cat([expected, last.argmax(-1, keepdim=True)], 1)
        assert torch.equal(gm.generate(ids, max_new_tokens=4, **settings), expected)
