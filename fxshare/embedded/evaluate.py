"""Measure and sample a language model: any callable from ids (B, T) to logits (B, T, V)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshare.errors import DataError


def predicted_bytes(windows: Tensor, token_bytes: Sequence[bytes]) -> int:
    """Bytes of the tokens that :func:`bits_per_byte` predicts: all but each window's first.

    ``windows`` is int64 (N, T); ``token_bytes`` gives every id's bytes (a separator has none).
    """
    lengths = torch.tensor([len(token) for token in token_bytes], dtype=torch.int64)
    return int(lengths[windows[:, 1:]].sum())


@torch.no_grad()
def bits_per_byte(
    model: Callable[[Tensor], Tensor], windows: Tensor, n_bytes: int, *, batch_size: int = 16
) -> float:
    """Bits that ``model`` needs per byte of text.

    Protocol: the windows, int64 (N, T), do not overlap; each is read alone, and its tokens 1..T-1
    are predicted from those before them in the window. The first token of a window is not
    predicted and its bytes are not counted: ``n_bytes`` is :func:`predicted_bytes`. Separators are
    predicted, so they cost bits, but they have no bytes. The result is the summed negative
    log-likelihood (in float64, of float32 log-softmax) / ln 2 / ``n_bytes``.

    The model is called as it is: put it in eval mode first.
    """
    if windows.dim() != 2 or windows.size(0) == 0 or windows.size(1) < 2 or n_bytes <= 0:
        raise DataError(
            "bits_per_byte: expected windows of shape (N >= 1, T >= 2) and n_bytes > 0, found"
            f" {tuple(windows.shape)} and {n_bytes}; see fxshare.embedded.corpus.pack"
        )
    nats = 0.0
    for batch in torch.split(windows, batch_size):
        # Whole windows, so that a graph captured for one length can be measured too.
        logits = model(batch)[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        nats += float(nll.double().sum())
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    ids: Sequence[int],
    *,
    n: int,
    temperature: float = 0.8,
    seed: int = 0,
    block_size: int = 256,
) -> list[int]:
    """Extend ``ids`` by ``n`` sampled tokens; returns the prompt and the new tokens.

    Each step runs the model again over the last ``block_size`` tokens (no cache). Temperature 0
    takes the most likely token. The draws come from a generator of their own: global random state
    is neither used nor changed.
    """
    if not ids or n < 0 or temperature < 0:
        raise DataError(
            "generate: expected a prompt of at least one token, n >= 0 and temperature >= 0, found"
            f" {len(ids)} tokens, n={n}, temperature={temperature}; start from the separator token"
        )
    generator = torch.Generator().manual_seed(seed)
    out = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([out[-block_size:]], dtype=torch.int64))[0, -1].float()
        if temperature == 0:
            out.append(int(logits.argmax()))
            continue
        probabilities = torch.softmax(logits / temperature, dim=-1)
        out.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return out


__all__ = ["bits_per_byte", "generate", "predicted_bytes"]
