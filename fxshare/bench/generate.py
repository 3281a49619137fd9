"""``fxshare bench generate``: tokens per second with a cache, by graph and by the model's own code.

A Llama, or a T5, with random weights, because speed does not depend on them, under the same plan in
every form. One call makes one token and another makes many; their difference is decoding alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.machine import environment, interleaved, median_seconds
from fxshare.base.progress import stage
from fxshare.errors import ConfigError, FxShareWarning
from fxshare.generation.module_form import module_form

_LOG = logging.getLogger(__name__)

TYPES: dict[str, Any] = {
    "weight_types": {
        name: {"pattern": rf".*\.{name}_proj$"}
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    },
    "block_pattern": r"layers\.(\d+)\.",
}
# one name for the projections of the encoder, of the decoder and between them
_T5_TYPES: dict[str, Any] = {
    "weight_types": {
        **{name: {"pattern": rf".*Attention\.{name}$"} for name in "qkvo"},
        **{name: {"pattern": rf".*DenseReluDense\.{name}$"} for name in ("wi", "wo")},
    },
    "block_pattern": r"block\.(\d+)\.",
}
VARIANTS = ("dense", "modules", "graph", "lowered")


@dataclass(frozen=True)
class GenerateBench:
    """``tokens_per_second`` and ``first_ms`` (prompt and first token) are medians by variant;
    ``to_modules`` are medians, over the rounds, of the speed beside the module-granularity form in
    the same round."""

    environment: dict[str, object]
    shape: str
    kept: float | None
    prompt: int
    new: int
    repeats: int
    tokens_per_second: dict[str, float]
    first_ms: dict[str, float]
    to_modules: dict[str, float]
    same_tokens: bool
    """Whether the forms of the compressed model made the same tokens."""
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


def llama(
    width: int = 512, layers: int = 8, heads: int = 8, ffn: int = 1408, *, seed: int = 0
) -> nn.Module:
    """A Llama with random weights; needs the ``hf`` extra."""
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    return _random(transformers.LlamaForCausalLM, config, seed)


def t5(width: int = 512, layers: int = 8, heads: int = 8, ffn: int = 1408, *, seed: int = 0) -> Any:
    """A T5 with random weights and as many layers in the encoder as in the decoder; needs the
    ``hf`` extra."""
    transformers = _transformers()
    config = transformers.T5Config(
        vocab_size=1024,
        d_model=width,
        d_kv=width // heads,
        d_ff=ffn,
        num_layers=layers,
        num_heads=heads,
        decoder_start_token_id=0,
    )
    return _random(transformers.T5ForConditionalGeneration, config, seed)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "bench generate needs the transformers library: pip install 'fxshare[hf]'"
        ) from error
    return transformers


def _random(cls: Any, config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = cls(config)
    return model.eval()


@stage("bench generate", _LOG)
def bench_generate(
    model: nn.Module,
    *,
    shape: str,
    kept: float | None = 0.5,
    prompt: int = 32,
    new: int = 64,
    repeats: int = 7,
    seed: int = 0,
) -> GenerateBench:
    """Time ``new`` tokens after a prompt of ``prompt``; ``kept`` None is exact mode."""
    mode = {} if kept is None else {"group_size": 2, "compression_rate": kept}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 1000, (1, prompt), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        example = {"input_ids": ids.repeat(2, 1)}
        types = TYPES
        if getattr(model.config, "is_encoder_decoder", False):
            types = _T5_TYPES
            example["decoder_input_ids"] = example["input_ids"][:, 1:]
        gm = fxshare.compile(model, {**types, **mode}, example=example)
        forms: dict[str, Any] = {
            "dense": model,
            "modules": module_form(gm),
            "graph": gm,
            "lowered": fxshare.lower(gm),
        }
        made = {name: _generated(form, ids, 8) for name, form in forms.items()}
    calls: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        calls[f"{name} 1"] = _call(form, ids, 1)
        calls[f"{name} n"] = _call(form, ids, new)
    times = interleaved(calls, repeats=repeats)
    spent = {
        name: [n - one for n, one in zip(times[f"{name} n"], times[f"{name} 1"], strict=True)]
        for name in forms
    }
    return GenerateBench(
        environment=environment(),
        shape=shape,
        kept=kept,
        prompt=prompt,
        new=new,
        repeats=repeats,
        tokens_per_second={n: (new - 1) / median_seconds(t) for n, t in spent.items()},
        first_ms={name: 1e3 * median_seconds(times[f"{name} 1"]) for name in forms},
        to_modules={
            name: median_seconds([b / a for a, b in zip(t, spent["modules"], strict=True)])
            for name, t in spent.items()
        },
        same_tokens=all(torch.equal(made["modules"], made[n]) for n in ("graph", "lowered")),
        notes=tuple(n for n in gm.fxshare.report.notes if n.startswith("generate")),
    )


def _generated(form: Any, ids: Tensor, new: int) -> Tensor:
    made: Tensor = form.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return made


def _call(form: Any, ids: Tensor, new: int) -> Callable[[], object]:
    return lambda: _generated(form, ids, new)


def table(result: GenerateBench) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["form", "tokens/s", "beside modules", "first token ms"]
    rows = [
        [
            name,
            f"{result.tokens_per_second[name]:.1f}",
            f"{result.to_modules[name]:.2f}",
            f"{result.first_ms[name]:.1f}",
        ]
        for name in VARIANTS
    ]
    return header, rows
