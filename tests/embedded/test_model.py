from __future__ import annotations

from typing import cast

import pytest
import torch

import fxshare.embedded
from fxshare.embedded.model import (
    GPT,
    CausalSelfAttention,
    GPTConfig,
    from_safetensors,
    to_safetensors,
)
from fxshare.errors import ConfigError, DataError


def test_logits_and_loss(tiny: GPT) -> None:
    idx = torch.randint(300, (3, 32))
    logits = tiny(idx)
    assert logits.shape == (3, 32, 300)
    again, loss = tiny(idx, idx)
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())
    torch.testing.assert_close(loss, expected)


def test_too_long_input_is_refused(tiny: GPT) -> None:
    with pytest.raises(AssertionError, match="at most 32 tokens"):
        tiny(torch.zeros(1, 33, dtype=torch.int64))


def test_causal(tiny: GPT) -> None:
    a = torch.randint(300, (2, 20))
    b = a.clone()
    b[:, 12:] = torch.randint(300, (2, 8))
    torch.testing.assert_close(tiny(a)[:, :12], tiny(b)[:, :12], rtol=0, atol=1e-6)
    assert (tiny(a)[:, 12:] - tiny(b)[:, 12:]).abs().max() > 1e-3


def test_matches_the_formula(tiny: GPT) -> None:
    """One attention layer written out: q|k|v blocks, heads, causal softmax."""
    attn = cast(CausalSelfAttention, tiny.get_submodule("transformer.h.0.attn"))
    x = torch.randn(2, 5, 16)
    q, k, v = (x @ w.T + b for w, b in zip(
        attn.c_attn.weight.chunk(3), attn.c_attn.bias.chunk(3), strict=True))  # fmt: skip
    heads = []
    for h in range(2):
        s = slice(8 * h, 8 * h + 8)
        scores = q[..., s] @ k[..., s].transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., s])
    torch.testing.assert_close(attn(x), attn.c_proj(torch.cat(heads, -1)), rtol=1e-5, atol=1e-6)


def test_weights_are_tied(tiny: GPT) -> None:
    assert tiny.lm_head.weight is tiny.transformer["wte"].weight
    assert "lm_head.weight" not in dict(tiny.named_parameters())


def test_module_names(tiny: GPT) -> None:
    names = {name for name, module in tiny.named_modules() if isinstance(module, torch.nn.Linear)}
    layer = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names == {f"transformer.h.{i}.{n}" for i in (0, 1) for n in layer} | {"lm_head"}


def test_default_size_fits_twelve_megabytes() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert 5_000_000 < sum(p.numel() for p in model.parameters()) < 5_900_000


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="n_embd=10 and n_head=3"):
        GPTConfig(n_embd=10, n_head=3)


def test_safetensors_round_trip(tiny: GPT) -> None:
    state = torch.get_rng_state()
    again = from_safetensors(to_safetensors(tiny, metadata={"note": "x"}))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == tiny.config
    assert not again.training
    assert again.lm_head.weight is again.transformer["wte"].weight
    for (name, a), (name_b, b) in zip(
        tiny.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == name_b
        assert b.dtype == torch.float32
        assert b.requires_grad
        assert torch.equal(a.bfloat16().float(), b), name
    assert to_safetensors(again) == to_safetensors(from_safetensors(to_safetensors(again)))


def test_a_missing_packaged_file_is_named() -> None:
    with pytest.raises(DataError, match=r"no_such\.bin"):
        fxshare.embedded._read("no_such.bin")
