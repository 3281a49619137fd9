"""Models of published shapes with random weights, made on the spot; needs the ``hf`` extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxshare.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a GPT-2 or of a Llama. ``context`` is how many tokens it reads at once."""

    name: str
    width: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    kv_heads: int = 0
    """0 for as many as heads."""
    context: int = 2048
    is_gpt2: bool = False

    @staticmethod
    def parse(text: str) -> ModelShape:
        """A name of :data:`SHAPES`, or ``d,L,h,f,vocab`` for a Llama; :class:`ConfigError` where it
        is neither."""
        if text in SHAPES:
            return SHAPES[text]
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError:
            sizes = []
        # rotary positions turn the halves of a head against each other
        if len(sizes) != 5 or min(sizes) < 1 or sizes[0] % (2 * sizes[2]):
            raise ConfigError(
                f"shape: expected {', '.join(SHAPES)}, or d,L,h,f,vocab for a Llama with d a "
                f"multiple of 2h, such as 512,8,8,1408,32000; found {text!r}"
            )
        width, layers, heads, ffn, vocabulary = sizes
        return ModelShape(text, width, layers, heads, ffn, vocabulary)

    def with_layers(self, layers: int) -> ModelShape:
        """The same widths at another depth."""
        return replace(self, layers=layers)

    def model(self, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
        """The model, in eval mode; the global random state and default dtype are left as they were.

        Raises :class:`ConfigError` without transformers.
        """
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                # born in its dtype: in float32 first, a model takes twice the memory for a moment
                torch.set_default_dtype(dtype)
                return self._made().eval()
            finally:
                torch.set_default_dtype(before)

    def parameters(self) -> int:
        """How many numbers the weights are: told by one and two layers without values, since a
        layer is like any other."""
        with torch.device("meta"):
            one, two = (_numbers(self.with_layers(n)._made()) for n in (1, 2))
        return one + (self.layers - 1) * (two - one)

    def _made(self) -> nn.Module:
        transformers = _transformers()
        if self.is_gpt2:
            config = transformers.GPT2Config(
                n_embd=self.width,
                n_layer=self.layers,
                n_head=self.heads,
                n_inner=self.ffn,
                vocab_size=self.vocabulary,
                n_positions=self.context,
            )
            made: nn.Module = transformers.GPT2LMHeadModel(config)
            return made
        config = transformers.LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            intermediate_size=self.ffn,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
        )
        made = transformers.LlamaForCausalLM(config)
        return made


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "a model of a shape (gpt2, tinyllama, or d,L,h,f,vocab) is one of the transformers "
            "library: pip install 'fxshare[hf]'"
        ) from error
    return transformers


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        one.name: one
        for one in (
            ModelShape("gpt2", 768, 12, 12, 3072, 50257, context=1024, is_gpt2=True),
            ModelShape("gpt2-medium", 1024, 24, 16, 4096, 50257, context=1024, is_gpt2=True),
            ModelShape("tinyllama", 2048, 22, 32, 5632, 32000, kv_heads=4),
            ModelShape("llama-7b", 4096, 32, 32, 11008, 32000),
            ModelShape("llama-70b", 8192, 80, 64, 28672, 32000, kv_heads=8, context=4096),
            ModelShape("llama-405b", 16384, 126, 128, 53248, 128256, kv_heads=8, context=8192),
        )
    }
)
"""Those that have a name: GPT-2, GPT-2 medium, TinyLlama-1.1B, Llama-7B, Llama 2 70B and Llama 3.1
405B."""


__all__ = ["SHAPES", "ModelShape"]
