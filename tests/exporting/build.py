"""Compiled models for the tests of exports: small, since exporters take seconds per layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import fxshare
from tests.strategies import gpt, gpt_config, no_warnings_of_ours, token_batches

SHARING = {"group_size": 2, "compression_rate": 0.6}
PIVOTED = {"budget": {"params_kept": 0.7}, "planner": {"search": "off", "storage": "pivoted"}}
MODES: dict[str, dict[str, Any]] = {"exact": {}, "sharing": SHARING, "pivoted": PIVOTED}


def model(**sizes: Any) -> nn.Module:
    """A toy GPT of two layers whose biases are not zero."""
    return gpt(**{"n_layer": 2, "n_head": 2, "head_dim": 6, "hidden": 20, **sizes})


def compiled(original: nn.Module, front_end: str = "fx", **options: Any) -> Any:
    """The toy, compiled; q, k and v of its fused projection are slices."""
    cfg = gpt_config(original.sizes, **options)
    if original.sizes.fused:
        cfg["weight_types"]["attn"] |= {"split": "qkv", "qkv_order": "qkv", "n_head": 2}
    with no_warnings_of_ours():
        return fxshare.compile(original, cfg, calibration=token_batches(), capture=front_end)


@functools.cache
def toy(mode: str, front_end: str = "fx") -> Any:
    """The toy, compiled in one of :data:`MODES`; tests must not change it."""
    return compiled(model(), front_end, **MODES[mode])


def transformers_model(family: str, **sizes: Any) -> nn.Module:
    """A random transformers model of two layers: ``gpt2`` (``Conv1D``) or ``llama``."""
    import transformers

    tokens = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_positions=24, n_embd=16, n_layer=2, n_head=4, **tokens, **sizes
        )
        made = transformers.GPT2LMHeadModel
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            **tokens,
            **sizes,
        )
        made = transformers.LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found: nn.Module = made(config).eval()
        for parameter in found.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, float(parameter.detach().mean().round()), 0.2)
    return found


def transformers_config(family: str, **options: Any) -> dict[str, Any]:
    """A configuration of sharing for such a model."""
    if family == "gpt2":
        types = {"attn": r".*\.c_attn$", "proj": r".*\.attn\.c_proj$", "fc": r".*\.c_fc$"}
        layers = r"h\.(\d+)"
    else:
        types = {name: rf".*\.{name}_proj$" for name in ("q", "k", "o", "up", "down")}
        layers = r"layers\.(\d+)"
    named = {name: {"pattern": pattern} for name, pattern in types.items()}
    return {"weight_types": named, "block_pattern": layers, **(options or SHARING)}


def compiled_transformers(family: str, original: nn.Module, **options: Any) -> Any:
    """Such a model, compiled on padded batches."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(32, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    with no_warnings_of_ours():
        cfg = transformers_config(family, **options)
        return fxshare.compile(original, cfg, calibration=batches)


def ids(rows: int = 5, length: int = 9, vocabulary: int = 32) -> Tensor:
    """Token ids of a size that no example has."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(vocabulary, (rows, length), generator=generator)
