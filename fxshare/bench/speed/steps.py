"""The two steps that are measured: reading a prompt, and making one more token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.bench.speed.subject import Subject, takes_cache
from fxshare.capture import device_of


@dataclass(frozen=True, eq=False)
class StepCall:
    """``calls`` holds each variant's arguments, ``after`` what makes the next call like this one
    (the cache is cut back); ``recorded`` are arguments without a cache, to count operations by."""

    name: str
    tokens: int
    device: torch.device
    calls: Mapping[str, Mapping[str, Any]]
    after: Mapping[str, Callable[[], None]]
    recorded: Mapping[str, Any]


def step_calls(
    subject: Subject, models: Mapping[str, nn.Module], *, prefill: int, seed: int, batch: int = 1
) -> list[StepCall]:
    """Prefill and decode of ``batch`` sequences: with a cache of the prompt where every variant
    takes one, else a pass over a single token."""
    length = min(prefill, subject.context or prefill)
    device = device_of(subject.dense)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(subject.vocabulary, (batch, length), generator=generator).to(device)
    found = [
        _plain("prefill", models, ids, device),
        _plain("decode", models, ids[:, -1:], device),
    ]
    if subject.kv_cache and all(takes_cache(model) for model in models.values()):
        found[1] = _cached(models, ids[:, : max(length - 1, 1)], found[1])
    return found


def _plain(
    name: str, models: Mapping[str, nn.Module], ids: Tensor, device: torch.device
) -> StepCall:
    calls = {variant: {_first(model): ids} for variant, model in models.items()}
    after = dict.fromkeys(models, nothing)
    return StepCall(name, ids.shape[1], device, calls, after, calls["dense"])


def _cached(models: Mapping[str, nn.Module], prompt: Tensor, plain: StepCall) -> StepCall:
    calls, after = {}, {}
    with torch.no_grad():
        for variant, model in models.items():
            cache = model(prompt, use_cache=True).past_key_values
            calls[variant] = {**plain.calls[variant], "past_key_values": cache, "use_cache": True}
            after[variant] = _cut(cache)
    return StepCall(plain.name, 1, plain.device, calls, after, plain.recorded)


def _cut(cache: Any) -> Callable[[], None]:
    def cut() -> None:
        cache.crop(-1)  # minus: take off so many tokens

    return cut


def _first(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))


def nothing() -> None:
    """What there is to do after a call that changes nothing."""
