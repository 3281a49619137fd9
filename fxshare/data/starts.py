"""What a tokenizer puts before every text, a BOS token where it has one: windows start with it.

A model that was trained with such a token in front has only ever seen texts that begin with it; its
first position gathers attention from all others (attention sinks, arXiv 2309.17453). Without it the
loss and the statistics are those of a model that nobody runs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fxshare.errors import FxShareWarning

_PROBE = "a"


def before_text(tokenizer: object) -> tuple[int, ...]:
    """The ids that a tokenizer of transformers puts before a text; others put none, or say it
    themselves by ``encode``."""
    return around_text(tokenizer)[0]


def around_text(tokenizer: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that it puts before a text, and those after it."""
    if not hasattr(tokenizer, "save_pretrained"):
        return (), ()
    of_transformers: Any = tokenizer
    plain = list(of_transformers.encode(_PROBE, add_special_tokens=False))
    whole = [int(one) for one in of_transformers.encode(_PROBE)]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def started(windows_NL: Tensor, before: tuple[int, ...]) -> Tensor:
    """Windows ``(N, L)`` with the ids of ``before`` put before each: ``(N, K + L)``."""
    if not before:
        return windows_NL
    first_K = torch.tensor(before, dtype=windows_NL.dtype, device=windows_NL.device)
    return torch.cat([first_K.expand(len(windows_NL), -1), windows_NL], dim=1)


def warn_of_others(firsts_N: Tensor, before: tuple[int, ...], *, name: str) -> None:
    """A :class:`FxShareWarning` where windows of a token file, of which these are the first ids,
    start otherwise than the tokenizer starts a text. They are taken as they are."""
    if not before:
        return
    others = int((firsts_N != before[0]).sum())
    if others:
        warnings.warn(
            f"{name}: {others} of {len(firsts_N)} windows do not start with {before[0]}, the token "
            "that the tokenizer puts before every text; the model is not used like that. Token "
            "files are taken as they are: write them with it at the start of every row, rows as "
            "long as the windows, or give text",
            FxShareWarning,
            stacklevel=3,
        )


def said(before: tuple[int, ...]) -> str:
    """What windows start with, to follow the words of a protocol; nothing where it is nothing."""
    if not before:
        return ""
    ids = ", ".join(str(one) for one in before)
    return f"; every window starts with {ids}, which the tokenizer puts before a text"


__all__ = ["before_text", "said", "started", "warn_of_others"]
