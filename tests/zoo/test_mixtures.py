"""Mixtures of transformers whose experts are multiplied in other ways than Mixtral's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare import FxShareWarning

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4}
LLAMA4 = {**HEADS, "intermediate_size_mlp": 48, "head_dim": 8}
# matrices in stacks, of both layers
MIXTURES = {
    "Llama4": ("Llama4TextConfig", LLAMA4, 2 * 2 * 4),
    "GraniteMoe": ("GraniteMoeConfig", HEADS, 2 * 2 * 4),
    "JetMoe": ("JetMoeConfig", {"kv_channels": 8, "num_experts_per_tok": 2}, 2 * 4 * 4),
}


def _made(name: str) -> nn.Module:
    config, own, _ = MIXTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES, **own)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(made)
    return model.eval()


def _call(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (3, 12), generator=generator)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return call


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "JetMoe" else ()) for n in MIXTURES],
)
def test_the_experts_are_sites(name: str) -> None:
    model = _made(name)
    no_cache = {} if name == "Llama4" else {"use_cache": False}
    data = [{**_call(seed), **no_cache} for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        exact = fxshare.compile(model, None, example=data[0])
        sharing = {"group_size": 2, "compression_rate": 0.6}
        shared = fxshare.compile(model, [fxshare.init(model), sharing], calibration=data)
    plan = exact.fxshare.plan
    experts = [site for site in plan.sites if site.name.rpartition(".")[2].isdecimal()]
    assert len(experts) == MIXTURES[name][2]
    assert (plan.skipped, exact.fxshare.report.warnings) == ((), ())
    assert sum(s.weights for s in plan.sites) > 0.75 * sum(p.numel() for p in model.parameters())
    other = _call(7)
    with torch.no_grad():
        expected = model(**other, **no_cache).logits
        torch.testing.assert_close(exact(**other).logits, expected, rtol=1e-4, atol=1e-5)
    assert shared.fxshare.report.params_kept <= 0.6
    assert len(shared.fxshare.plan.sites) == len(plan.sites)
    assert fxshare.verify(model, shared, [{**_call(8), **no_cache}]).ok


def test_a_weight_that_mamba_multiplies_by_itself_is_left_and_not_offered() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, expand=2)).eval()
    ids = _call(0)["input_ids"][:, :4]  # a loop over them, which the trace writes out
    proposal = fxshare.propose(model, example=ids)
    assert "dt_proj" not in proposal.config.weight_types
    (left,) = (one for one in proposal.left_out if "dt_proj" in one.name)
    assert "reads its weight itself" in left.reason
    budget = {"budget": {"params_kept": 0.8}, "planner": {"search": "off"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        gm = fxshare.compile(model, [fxshare.init(model), budget], calibration=[ids, ids])
    skipped = {s.name: s.reason for s in gm.fxshare.plan.skipped}
    assert set(skipped) == {f"backbone.layers.{n}.mixer.dt_proj" for n in range(2)}
    assert all("reads its weight itself" in reason for reason in skipped.values())
