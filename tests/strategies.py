"""Models and configurations for the end-to-end tests, and hypothesis strategies over both.

Legend for shapes: B batch, T sequence, D width, H heads, K key and value heads, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fxshare import FxShareWarning

VOCAB = 37
LONGEST = 16


class Conv1D(nn.Module):
    """What transformers' ``Conv1D`` is: a linear that stores ``(in, out)``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf) / 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.nf)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that makes one toy model differ from another."""

    family: str = "gpt"
    n_layer: int = 2
    n_head: int = 2
    n_kv_head: int = 2
    head_dim: int = 4
    hidden: int = 12
    bias: bool = True
    conv1d: bool = False
    fused: bool = True
    dropout: float = 0.0
    seed: int = 0

    @property
    def width(self) -> int:
        return self.n_head * self.head_dim

    @property
    def qkv(self) -> tuple[int, int, int]:
        kv = self.n_kv_head * self.head_dim
        return self.width, kv, kv


def _linear(sizes: Sizes, features: int, out: int) -> nn.Module:
    return Conv1D(out, features) if sizes.conv1d else nn.Linear(features, out, bias=sizes.bias)


class Attention(nn.Module):
    """Causal attention, fused (``c_attn``) or not, with rotary positions in the llama family."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        q, k, v = sizes.qkv
        if sizes.fused:
            self.c_attn = _linear(sizes, sizes.width, q + k + v)
        else:
            self.q_proj = _linear(sizes, sizes.width, q)
            self.k_proj = _linear(sizes, sizes.width, k)
            self.v_proj = _linear(sizes, sizes.width, v)
        self.c_proj = _linear(sizes, sizes.width, sizes.width)
        self.dropout = sizes.dropout
        self.resid_dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.size()
        if self.sizes.fused:
            q, k, v = self.c_attn(x).split(self.sizes.qkv, dim=2)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(b, t, -1, self.sizes.head_dim).transpose(1, 2)
        k = k.view(b, t, -1, self.sizes.head_dim).transpose(1, 2)
        v = v.view(b, t, -1, self.sizes.head_dim).transpose(1, 2)
        if self.sizes.family == "llama":
            q, k = _rotated(q), _rotated(k)
        readers = self.sizes.n_head // self.sizes.n_kv_head
        k, v = k.repeat_interleave(readers, 1), v.repeat_interleave(readers, 1)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, d)))


def _rotated(x: Tensor) -> Tensor:
    t, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(t, device=x.device)[:, None] / 10.0 ** torch.arange(half, device=x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MLP(nn.Module):
    """GELU between two linears, or gate, up and down in the llama family."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gated = sizes.family == "llama"
        if self.gated:
            self.gate_proj = _linear(sizes, sizes.width, sizes.hidden)
        self.c_fc = _linear(sizes, sizes.width, sizes.hidden)
        self.c_proj = _linear(sizes, sizes.hidden, sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.gate_proj(x)) * self.c_fc(x) if self.gated else F.gelu(self.c_fc(x))
        return self.dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width)
        self.attn = Attention(sizes)
        self.ln_2 = nn.LayerNorm(sizes.width)
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT's layout: ``lm_head`` tied to ``wte``; returns the logits, and the loss if asked."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(sizes.seed)
        self.sizes = sizes
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, sizes.width),
                "wpe": nn.Embedding(LONGEST, sizes.width),
                "drop": nn.Dropout(sizes.dropout),
                "h": nn.ModuleList(Block(sizes) for _ in range(sizes.n_layer)),
                "ln_f": nn.LayerNorm(sizes.width),
            }
        )
        self.lm_head = nn.Linear(sizes.width, VOCAB, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        _, t = idx.size()
        assert t <= LONGEST, f"cannot forward {t} tokens, block size is only {LONGEST}"
        x = self.transformer["wte"](idx)
        x = x + self.transformer["wpe"](torch.arange(0, t, dtype=torch.long, device=idx.device))
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def gpt(dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    """A toy model of the given sizes, in eval mode, from the seed in its sizes.

    The global generator is left as it was, so that two calls cannot influence each other.
    """
    with torch.random.fork_rng():
        return GPT(Sizes(**changes)).to(dtype).eval()


def token_batches(count: int = 4, rows: int = 3, length: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for _ in range(count)]


def gpt_config(sizes: Sizes = Sizes(), /, **changes: Any) -> dict[str, Any]:
    """A configuration that matches every linear of a toy model; ``changes`` go on top."""
    types: dict[str, Any] = {
        "proj": {"pattern": r".*\.attn\.c_proj$"},
        "fc": {"pattern": r".*\.mlp\.c_fc$"},
        "down": {"pattern": r".*\.mlp\.c_proj$"},
    }
    if sizes.fused:
        types["attn"] = {"pattern": r".*\.attn\.c_attn$"}
    else:
        types |= {p: {"pattern": rf".*\.attn\.{p}_proj$"} for p in "qkv"}
    if sizes.family == "llama":
        types["gate"] = {"pattern": r".*\.mlp\.gate_proj$"}
    return {"weight_types": types, "block_pattern": r"h\.(\d+)", **changes}


SHARING = {"group_size": 2, "compression_rate": 0.6}


@st.composite
def model_sizes(draw: st.DrawFn) -> Sizes:
    """Sizes of a nanoGPT-like or a llama-like model."""
    n_head = draw(st.sampled_from([1, 2, 3, 2, 4]))
    llama = draw(st.booleans())
    conv1d = not llama and draw(st.booleans())
    kv = [k for k in range(1, n_head + 1) if n_head % k == 0]
    return Sizes(
        family="llama" if llama else "gpt",
        n_layer=draw(st.sampled_from([1, 2, 3, 1, 2, 4])),
        n_head=n_head,
        n_kv_head=draw(st.sampled_from(kv)) if llama else n_head,
        # LayerNorm over two features gives ±1 or, where both are nearly equal, rounding blown up
        head_dim=draw(st.sampled_from([4, 6])),
        hidden=draw(st.integers(1, 24)),
        bias=conv1d or draw(st.booleans()),
        conv1d=conv1d,
        fused=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def configurations(draw: st.DrawFn, sizes: Sizes) -> dict[str, Any]:
    """A configuration of splits for a model of these sizes; neither rate nor group size."""
    cfg = gpt_config(sizes)
    cfg["fuse"] = draw(st.booleans())
    types: dict[str, Any] = cfg["weight_types"]
    if sizes.fused:
        attn = types["attn"]
        attn["split"] = draw(st.sampled_from([False, "qkv", "heads"]))
        attn["basis"] = draw(st.sampled_from(["slice", "part", "site"]))
        if attn["split"]:
            attn["qkv_order"] = draw(st.sampled_from(["".join(p) for p in permutations("qkv")]))
            attn["n_head"] = sizes.n_head
            if sizes.n_kv_head != sizes.n_head:
                # the toy model stores [q|k|v]; another order would cut rows at other places
                attn["n_kv_head"] = sizes.n_kv_head
    else:
        for part, rows in zip("qkv", sizes.qkv, strict=True):
            types[part]["basis"] = draw(st.sampled_from(["slice", "site"]))
            if draw(st.booleans()):
                types[part] |= {"split": "heads", "n_head": rows // sizes.head_dim}
    if draw(st.booleans()):
        del types["proj"]
    return cfg


@st.composite
def sharing(draw: st.DrawFn, cfg: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with bases shared."""
    types = sorted(cfg["weight_types"])
    return {
        **cfg,
        "group_size": draw(st.integers(1, 4)),
        "compression_rate": draw(st.sampled_from([0.1, 0.35, 0.6, 0.8, 0.95])),
        "private": draw(st.lists(st.sampled_from(types), unique=True, max_size=2)),
    }


@contextmanager
def no_warnings_of_ours() -> Iterator[None]:
    """Small models and tiny data warn by right; where a test is about something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        yield
