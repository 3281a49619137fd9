"""A zoo of small models, shared by all tests: ``from tests.toys import TOYS, toy``.

(`python -m pytest` from the repository root puts the root on the path, so ``tests`` is a package.)

Everything is offline and a function of the seed. Every model comes in eval mode and float32, and
takes its inputs by position. Legend for shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32
WIDTH = 16
HEADS = 4
LAYERS = 3


class ResidualBlock(nn.Module):
    """Two linears of their own, ``fc`` and ``out``, around a ReLU."""

    def __init__(self, inner: int = WIDTH) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, inner)
        self.out = nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.fc(x)))


class Residual(nn.Module):
    """Two blocks ``h.0`` and ``h.1`` on features."""

    def __init__(self, inner: int = WIDTH) -> None:
        super().__init__()
        self.h = nn.ModuleList(ResidualBlock(inner) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


@dataclass(frozen=True, eq=False)
class Toy:
    """One model of the zoo.

    ``fused`` names the linears that hold several projections, with the rows of each in order;
    ``heads`` those that can be cut into heads, with their number.
    """

    name: str
    make: Callable[[], nn.Module]
    tokens: bool = True
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with random weights, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases of zero and gains of one would hide mistakes
                    nn.init.normal_(parameter, 0.5 if parameter.mean() > 0.5 else 0.0, 0.3)
        return model.to(dtype)

    def inputs(
        self, batch: int = 2, length: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """One call's positional arguments."""
        generator = torch.Generator().manual_seed(1000 + seed)
        if self.tokens:
            return (torch.randint(VOCABULARY, (batch, length), generator=generator),)
        return (torch.randn(batch, length, WIDTH, generator=generator).to(dtype),)


class _Attention(nn.Module):
    """nanoGPT's: a fused ``c_attn``, and a dropout that follows ``training``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.size()
        q, k, v = self.c_attn(x).split(d, dim=2)
        q, k, v = (s.view(b, t, HEADS, d // HEADS).transpose(1, 2) for s in (q, k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, d))


class _MLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class _Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = _Attention(dropout)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = _MLP(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT: asserts on the length, optional targets, a head tied to the embedding."""

    def __init__(self, layers: int = LAYERS, dropout: float = 0.1, block_size: int = 24) -> None:
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(block_size, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(_Block(dropout) for _ in range(layers)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits ``(B, T, vocabulary)``, and the loss where there are targets."""
        _, t = idx.size()
        assert t <= self.block_size, f"{t} tokens, the block size is {self.block_size}"
        positions = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` between an embedding and a classifier."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores ``(B, 5)``."""
        return self.head(self.encoder(self.embed(ids)).mean(1))


class TiedMLP(nn.Module):
    """A linear called twice in a row, two modules with one weight, linears back to back."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias
        self.down = nn.Linear(WIDTH, 6, bias=False)
        self.up = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, D)`` to ``(…, D)``."""
        x = torch.tanh(self.twice(self.twice(x)))
        x = x + torch.relu(self.left(x)) * self.right(x)
        return self.up(self.down(x))


class _LlamaBlock(nn.Module):
    """q, k, v read one activation, gate and up another; fewer heads of k and v than of q."""

    def __init__(self) -> None:
        super().__init__()
        kv = WIDTH // 2
        self.norm_1 = nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, kv, bias=False)
        self.v_proj = nn.Linear(WIDTH, kv, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.RMSNorm(WIDTH)
        self.gate_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (
            projection(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LlamaLike(nn.Module):
    """Llama's layout, written by hand."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_LlamaBlock() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, T, vocabulary)``."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class InPlace(nn.Module):
    """Activations that are written to between one read and the next, each time another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)
        self.d = nn.Linear(WIDTH, WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, D)`` to ``(…, D)``; the input itself is left alone."""
        x = x.clone()
        y = self.a(x)
        x.add_(1.0)
        y = y + self.b(x)
        x.flatten().mul_(0.5)  # through a view
        y = y + self.c(x)
        self.relu(x)  # a module, its result unread
        return y + self.d(x)


class Branches(nn.Module):
    """One linear in both branches of a residual block, beside one in only one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.own = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mixture ``(…, D)``, and both branches."""
        left = torch.tanh(self.shared(x))
        right = self.own(torch.relu(self.shared(-x)))
        weight = torch.sigmoid(self.gate(x))
        return weight * left + (1 - weight) * right, {"left": left, "right": right}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=24,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=24,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _fused(pattern: str) -> dict[str, dict[str, int]]:
    return {pattern.format(i): dict.fromkeys("qkv", WIDTH) for i in range(LAYERS)}


def _per_layer(**heads: int) -> dict[str, int]:
    return {f"layers.{i}.{name}": n for i in range(LAYERS) for name, n in heads.items()}


NANOGPT = Toy("nanogpt", NanoGPT, fused=_fused("transformer.h.{}.attn.c_attn"))
ENCODER = Toy("encoder", Encoder)
TIED_MLP = Toy("tied-mlp", TiedMLP, tokens=False)
LLAMA_LIKE = Toy(
    "llama-like", LlamaLike, heads=_per_layer(q_proj=HEADS, k_proj=HEADS // 2, v_proj=HEADS // 2)
)
GPT2 = Toy("gpt2", _gpt2, fused=_fused("transformer.h.{}.attn.c_attn"))
LLAMA = Toy(
    "llama",
    _llama,
    heads={
        f"model.{name.replace('.q', '.self_attn.q')}": n for name, n in _per_layer(q_proj=4).items()
    },
)
IN_PLACE = Toy("in-place", InPlace, tokens=False)
BRANCHES = Toy("branches", Branches, tokens=False)

TOYS = (NANOGPT, ENCODER, TIED_MLP, LLAMA_LIKE, GPT2, LLAMA, IN_PLACE, BRANCHES)


def toy(name: str) -> Toy:
    """The toy of that name."""
    return next(one for one in TOYS if one.name == name)


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Every tensor's identity, version and a copy of its values; compare with ``same_tensors``."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: (id(t), t._version, t.detach().clone()) for name, t in named}


def same_tensors(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two results of :func:`tensors_of` are the same tensors with the same values."""
    return left.keys() == right.keys() and all(
        left[name][:2] == right[name][:2] and torch.equal(left[name][2], right[name][2])
        for name in left
    )
