"""Models of the zoo made ready for long generations, and prompts of different lengths."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import fxshare
from tests.zoo.families import FAMILIES, Family, family, transformers_model
from tests.zoo.written import VOCABULARY

NEW = 64
LENGTHS = (9, 7, 5)
NAMES = tuple(f.name for f in FAMILIES if f.causal and f.name != "nanogpt")


def prompts() -> dict[str, Tensor]:
    """Three prompts ``(3, 9)``, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in LENGTHS])
    return {"input_ids": ids * mask, "attention_mask": mask}


def batches() -> list[Tensor]:
    """What to capture with."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (2, 12), generator=generator) for _ in range(2)]


def causal(name: str, seed: int = 0) -> Any:
    """A model that makes ``NEW`` tokens, whichever they are: it has positions enough and no end."""
    model: Any = family(name).model(seed)
    for path, module in list(model.named_modules()):
        leaf = path.rpartition(".")[2]
        if leaf in ("wpe", "embed_positions"):  # learned positions
            longer = torch.randn(2 * NEW, module.weight.shape[1]) / 2
            module.weight = nn.Parameter(longer)
            module.num_embeddings = len(longer)
    for key in ("n_positions", "max_position_embeddings"):
        if hasattr(model.config, key):
            setattr(model.config, key, 2 * NEW - 2)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    return model


def seq2seq(name: str, seed: int = 0) -> Any:
    """:func:`causal` for a model of encoder and decoder."""
    if name == "bart":
        return bart(seed)
    model: Any = family(name).model(seed)
    if name == "whisper":
        decoder = model.model.decoder
        decoder.embed_positions.weight = nn.Parameter(torch.randn(2 * NEW, 32) / 2)
        for holder in (model, decoder, model.config):
            holder.max_target_positions = 2 * NEW
    model.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    return model


def bart(seed: int = 0) -> Any:
    """A BART, whose decoder is deeper than its encoder; learned positions, no position ids."""
    model: Any = transformers_model(
        "BartConfig",
        "BartForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=2 * NEW,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    return model.eval()


_BART = {
    "weight_types": {
        "attn": {"pattern": r".*layers\.\d+\..*attn\.[qkv]_proj$"},
        "fc": {"pattern": r".*layers\.\d+\.fc1$"},
    },
    "block_pattern": r"layers\.(\d+)",
}


def sources(name: str) -> dict[str, Tensor]:
    """Three inputs of an encoder; texts of different lengths are padded on the right."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 32, generator=generator)}
    given = prompts()
    # a model that has seen none must not take the first tokens for padding
    return {key: value.flip(1) for key, value in given.items()}


def compiled_seq2seq(name: str, model: nn.Module, **keys: Any) -> Any:
    """:func:`compiled` with an example of both inputs, ``mode`` on top of the configuration."""
    config = _BART if name == "bart" else family(name).config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxshare.FxShareWarning)
        return fxshare.compile(
            model, [config, keys.pop("mode", {})], **{"example": example_of(name), **keys}
        )


def example_of(name: str) -> dict[str, Any]:
    """One call of both inputs."""
    return family("t5" if name == "bart" else name).call()


@cache
def seq2seq_pair(name: str) -> tuple[Any, Any]:
    """:func:`pair` for encoder and decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = seq2seq(name)
    return model, compiled_seq2seq(name, model)


def compiled(name: str, model: nn.Module, **keys: Any) -> Any:
    """The model compiled under its family's configuration, with ``keys`` on top."""
    mode = keys.pop("mode", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxshare.FxShareWarning)
        return fxshare.compile(
            model, {**family(name).config, **mode}, **{"calibration": batches(), **keys}
        )


@cache
def pair(name: str) -> tuple[Any, Any]:
    """A model and its exact form, shared by tests that change neither."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = causal(name)
    return model, compiled(name, model)


def notes(gm: Any) -> list[str]:
    """What the record says about steps that no graph runs."""
    return [note for note in gm.fxshare.report.notes if note.startswith("generate")]


def sampled(model: Any, seed: int = 0, **options: Any) -> Any:
    """A seeded sample at a temperature that visits many tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = {**prompts(), "max_new_tokens": NEW, "do_sample": True, "temperature": 1.5}
        return model.generate(**{**given, **options})


__all__ = [
    "LENGTHS",
    "NAMES",
    "NEW",
    "Family",
    "batches",
    "causal",
    "compiled",
    "compiled_seq2seq",
    "example_of",
    "notes",
    "pair",
    "prompts",
    "sampled",
    "seq2seq",
    "seq2seq_pair",
    "sources",
]
