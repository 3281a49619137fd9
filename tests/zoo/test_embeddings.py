"""Every family with its embeddings and head in: what ``fxshare init`` offers, taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.generation.module_form import module_form
from fxshare.result.module import record_of
from tests.zoo.families import FAMILIES, Family, family

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


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "opt"))],
)
def test_without_a_cache_the_models_own_code_looks_up_factors(name: str) -> None:
    model, cfg = with_offers(family(name))
    cfg |= {"group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(model, cfg, calibration=family(name).batches())
    ids = family(name).call()["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = gm.generate(ids, **settings)
    assert torch.equal(gm.generate(ids, use_cache=False, **settings), found)
    own = module_form(gm)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, logits = gm(**call).logits, own(**call).logits
    depth = 2 * len(record_of(gm).plan.sites)
    assert worst(expected, logits).relative <= tolerance(torch.float32, depth)
    # over the graph's own tensors, each once
    kept = {p.data_ptr() for p in gm.parameters()}
    assert {p.data_ptr() for p in own.parameters()} <= kept
    embedding = own.get_input_embeddings()
    assert isinstance(embedding, type(model.get_input_embeddings()))
    assert embedding.weight.shape == model.get_input_embeddings().weight.shape
