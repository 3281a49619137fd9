"""A small GPT in the nanoGPT layout: the demo's model.

Legend for shapes: B windows, T tokens per window, D width (``n_embd``), H heads, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from fxshare.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a :class:`GPT`; the defaults are those of the packaged model (5.6 M parameters)."""

    n_layer: int = 8
    n_head: int = 7
    n_embd: int = 224
    block_size: int = 256
    vocab_size: int = 3072
    dropout: float = 0.0
    bias: bool = True
    n_ffn: int | None = None
    """Hidden width of the MLP; ``4 * n_embd`` where None."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"GPTConfig.n_embd must be a multiple of n_head, found n_embd={self.n_embd} and"
                f" n_head={self.n_head}; choose n_embd = n_head * head_size"
            )


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention; ``c_attn`` computes q, k and v as three blocks of D outputs."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, D) to (B, T, D)."""
        b, t, d = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(b, t, self.n_head, d // self.n_head).transpose(1, 2)
        k = k.view(b, t, self.n_head, d // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, d // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        y = y.transpose(1, 2).contiguous().view(b, t, d)
        return cast(Tensor, self.resid_dropout(self.c_proj(y)))


class MLP(nn.Module):
    """Two linear maps, D to ``n_ffn`` (4D) and back, with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.n_ffn or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, D) to (B, T, D)."""
        return cast(Tensor, self.dropout(self.c_proj(self.gelu(self.c_fc(x)))))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, D) to (B, T, D)."""
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT whose ``lm_head`` shares its weight with the token embedding ``transformer.wte``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as GPT-2: N(0, 0.02), output projections shrunk by sqrt(2 * n_layer)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02
                if name.endswith("c_proj"):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the next token at every position.

        ``idx`` is int64 (B, T) with T <= block_size. Without ``targets`` the result is the logits
        (B, T, V); with ``targets``, int64 (B, T), it is the pair (logits, mean loss in nats).
        """
        _b, t = idx.size()
        assert t <= self.config.block_size, (
            f"GPT takes at most {self.config.block_size} tokens (block_size), found {t};"
            " cut the sequence into windows"
        )
        parts = self.transformer
        pos = torch.arange(0, t, device=idx.device)
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](pos))
        for block in cast(nn.ModuleList, parts["h"]):
            x = block(x)
        logits = cast(Tensor, self.lm_head(parts["ln_f"](x)))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
        return logits, loss


def from_safetensors(data: bytes) -> GPT:
    """Rebuild a model from the bytes that :func:`to_safetensors` returns: float32, eval mode.

    The global random state is left as it was: the weights are never initialised.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads(header["__metadata__"]["config"])))
    weights = {name: tensor.float() for name, tensor in load(data).items()}
    # One owner in the file, two names in the model.
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = cast(nn.Embedding, model.transformer["wte"]).weight
    return model.eval()


def to_safetensors(model: GPT, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Weights in bfloat16 as a safetensors file; the tied weight is stored once, as ``wte``."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    config = json.dumps(asdict(model.config))
    return save(weights, metadata={**(metadata or {}), "config": config})


__all__ = [
    "GPT",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GPTConfig",
    "from_safetensors",
    "to_safetensors",
]
