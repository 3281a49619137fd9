"""How well a language model predicts text, under a protocol that is always named.

Legend for shapes: T tokens of a stream, N windows, L tokens per window, B windows per batch,
V ids of the vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshare.base.progress import stage, track
from fxshare.capture import device_of
from fxshare.data.starts import said, started
from fxshare.data.tokens import check_ids
from fxshare.errors import CheckFailed, DataError
from fxshare.models.traits import vocabulary_of

_LOG = logging.getLogger(__name__)

Protocol = Literal["A", "B"]
PROTOCOLS: Mapping[Protocol, str] = {
    "A": "GPTQ: text joined, windows without overlap, remainder dropped, mean over all predicted "
    "tokens",
    "B": "Basis Sharing: text joined, windows without overlap, short last window kept, mean of "
    "window means",
}
"""What each protocol does, in words. Each window is read alone and its first token is not
predicted. Perplexities of different protocols, or of different window lengths, do not compare."""


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    ``nll`` is the negative log-likelihood per token in nats, averaged as the protocol says;
    ``bits_per_byte`` the summed one in bits over the bytes of the predicted tokens; ``tokens``
    the number of predicted tokens.
    """

    protocol: Protocol
    description: str
    nll: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    length: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.perplexity:.4f} ({self.nll:.4f} nats per token{bits}) over "
            f"{self.tokens:,} tokens in {self.windows:,} windows of {self.length}, "
            f"{self.seconds:.1f} s; protocol {self.protocol}, {self.description}"
        )


@stage("evaluate", _LOG)
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    protocol: Protocol = "A",
    length: int | None = None,
    bytes_per_token: float | Tensor | None = None,
    batch_size: int = 4,
    before: tuple[int, ...] = (),
) -> Evaluation:
    """Perplexity of a language model, and bits per byte where bytes are known.

    Parameters
    ----------
    model
        Called with ids (B, L); returns logits (B, L, V), a tuple or list with the logits first, or
        an object or mapping with ``logits``. Run in eval mode; its mode is restored.
    tokens
        A stream of ids (T,), cut here into windows of ``length``; or windows (N, L), taken as they
        are.
    protocol
        ``"A"`` or ``"B"``, see :data:`PROTOCOLS`.
    bytes_per_token
        Bytes of text per token on average, or of every id, (V,).
    before
        Ids that every window of a stream starts with, within its ``length``, as the tokenizer puts
        them before a text; they are never what is predicted.

    Raises
    ------
    DataError
        Tokens that the model does not know, too few of them, or a model that returns no logits.
    CheckFailed
        A loss that is not finite.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol: expected one of {', '.join(PROTOCOLS)}, found {protocol!r}")
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, found {batch_size}")
    start = time.perf_counter()
    windows, last = _cut(tokens, length, before, keep_last=protocol == "B")
    check_ids(tokens, vocabulary_of(model), name="tokens")
    batches = list(torch.split(windows, batch_size)) if len(windows) else []
    if last is not None:
        batches.append(last)
    device = device_of(model)
    given = max(0, len(before) - 1)  # predicted positions that `before` has anyway
    sums: list[float] = []
    counts: list[int] = []
    n_bytes = 0.0
    with torch.no_grad(), _eval_mode(model):
        for batch in track(batches, "evaluating", total=len(batches)):
            nll_BT = _nll(model, batch.to(device))[:, given:]
            if not bool(torch.isfinite(nll_BT).all()):
                at = len(sums) + int((~torch.isfinite(nll_BT)).any(dim=1).int().argmax())
                raise CheckFailed(
                    f"evaluation: the loss of {type(model).__name__} is not finite in window {at}; "
                    "its weights or activations overflow: look for the first layer that does, or "
                    "evaluate in float32"
                )
            sums += nll_BT.sum(dim=1).tolist()
            counts += [nll_BT.shape[1]] * nll_BT.shape[0]
            n_bytes += _bytes(batch[:, 1 + given :], bytes_per_token)
    total, predicted = math.fsum(sums), sum(counts)
    if protocol == "A":
        nll = total / predicted
    else:
        nll = math.fsum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums)
    return Evaluation(
        protocol=protocol,
        description=PROTOCOLS[protocol] + said(before),
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        bits_per_byte=total / math.log(2) / n_bytes if n_bytes > 0 else None,
        tokens=predicted,
        windows=len(sums),
        length=batches[0].shape[1],
        seconds=time.perf_counter() - start,
    )


def _cut(
    tokens: Tensor, length: int | None, before: tuple[int, ...], *, keep_last: bool
) -> tuple[Tensor, Tensor | None]:
    """Whole windows (N, L), and the short last one (1, l) where it is kept and predicts a token."""
    if tokens.ndim == 2:
        if length not in (None, tokens.shape[1]):
            raise DataError(
                f"tokens: windows of {tokens.shape[1]} tokens were given together with length "
                f"{length}; give a stream (T,) to have it cut"
            )
        if tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise DataError(
                f"tokens: expected at least one window of two tokens, found shape "
                f"{tuple(tokens.shape)}"
            )
        return tokens.long(), None
    if tokens.ndim != 1:
        raise DataError(f"tokens: expected shape (T,) or (N, L), found {tuple(tokens.shape)}")
    least = max(2, len(before) + 1)
    if length is None or length < least:
        raise DataError(
            f"length: a stream needs a window length of at least {least}, found {length}"
        )
    own = length - len(before)
    whole = len(tokens) // own
    windows = started(tokens[: whole * own].long().view(whole, own), before)
    rest = started(tokens[whole * own :].long()[None], before)
    last = rest if keep_last and rest.shape[1] >= least else None
    if whole == 0 and last is None:
        raise DataError(
            f"tokens: expected at least {own}, one window, found {len(tokens)}; give more data "
            "or a smaller length"
        )
    return windows, last


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    for m, _ in flags:
        m.training = False
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


def _nll(model: nn.Module, batch_BL: Tensor) -> Tensor:
    """Negative log-likelihood (B, L - 1) in float64, of a float32 log-softmax."""
    logits_BLV = _logits(model, model(batch_BL))
    if logits_BLV.ndim != 3 or logits_BLV.shape[:2] != batch_BL.shape:
        raise DataError(
            f"{type(model).__name__}: expected logits of shape (batch, length, vocabulary) = "
            f"({batch_BL.shape[0]}, {batch_BL.shape[1]}, V), found {tuple(logits_BLV.shape)}; only "
            "a language model can be evaluated on text"
        )
    targets = batch_BL[:, 1:]
    check_ids(targets, logits_BLV.shape[2], name="tokens")
    # Window by window: a float32 copy of a whole batch of logits may not fit.
    rows = [
        F.cross_entropy(logits_LV[:-1].float(), target, reduction="none")
        for logits_LV, target in zip(logits_BLV, targets, strict=True)
    ]
    return torch.stack(rows).double()


def _logits(model: nn.Module, output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Sequence) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise DataError(
            f"{type(model).__name__}: expected logits, as a tensor, first in a tuple, or named "
            f"logits, found {type(output).__name__}; only a language model can be evaluated on text"
        )
    return output


def _bytes(targets: Tensor, bytes_per_token: float | Tensor | None) -> float:
    if bytes_per_token is None:
        return 0.0
    if isinstance(bytes_per_token, Tensor):
        return float(bytes_per_token[targets].sum())
    return bytes_per_token * targets.numel()


__all__ = ["PROTOCOLS", "Evaluation", "Protocol", "evaluate"]
